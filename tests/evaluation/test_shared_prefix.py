"""The tree of rows that begin alike: every token of every row once, nothing scored shared, little run twice."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation import shared_prefix
from pipeline.evaluation.shared_prefix import Pass, Span, deal, passes, share

Row = tuple[tuple[int, ...], int]


def walked(roots: list[Span], most_tokens: int) -> dict[int, tuple[int, ...]]:
    """What the network sees of each row when all passes run, with caches as they would be."""
    seen: dict[int, tuple[int, ...]] = {}
    for made in passes(roots, most_tokens):
        width = max(len(span.own) for span in made.spans)
        assert len(made.spans) == 1 or width * len(made.spans) <= most_tokens
        assert min(len(span.own) for span in made.spans) > 0
        before = [made.parent.cache[place] for place in made.continues] if made.parent else [()] * len(made.spans)
        whole = [past + tuple(span.own) for past, span in zip(before, made.spans)]
        made.cache = [whole[place] for place in made.kept]
        for span, tokens in zip(made.spans, whole):
            assert (span.row is None) == bool(span.children)
            if span.row is not None:
                assert span.row not in seen
                seen[span.row] = tokens
    return seen


@st.composite
def families(draw) -> list[Row]:
    """Rows made of a few pieces, so that they begin alike in many ways."""
    pieces = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=4))
    chosen = draw(st.lists(st.lists(st.sampled_from(pieces), min_size=1, max_size=6), min_size=1, max_size=12))
    rows = sorted({sum(parts, ()) for parts in chosen})
    return [(row, draw(st.integers(1, len(row)))) for row in draw(st.permutations(rows))]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rows=families(),
    shortest=st.integers(1, 6),
    saved=st.integers(1, 12),
    most=st.integers(1, 60),
    ranks=st.integers(1, 3),
)
def test_every_row_is_run_whole_and_its_scored_end_alone(rows, shortest, saved, most, ranks):
    shared_prefix.SHORTEST, before = shortest, shared_prefix.SHORTEST
    shared_prefix.LEAST_SAVED, before_saved = saved, shared_prefix.LEAST_SAVED
    try:
        roots = share(rows)
    finally:
        shared_prefix.SHORTEST, shared_prefix.LEAST_SAVED = before, before_saved
    assert walked(roots, most) == {number: tokens for number, (tokens, _) in enumerate(rows)}
    todo = list(roots)
    while todo:
        span = todo.pop()
        todo += span.children
        if span.row is not None:
            assert len(span.own) >= rows[span.row][1]
        else:
            assert len(span.own) >= shortest
    shares = deal(roots, ranks)
    assert len(shares) == ranks
    found = [walked(part, most) for part in shares]
    assert {number: tokens for part in found for number, tokens in part.items()} == walked(roots, most)
    assert sum(map(len, found)) == len(rows)


def test_questions_after_examples_cost_what_they_add():
    examples = tuple(range(350))
    rows = [((*examples, *[1000 + n] * 100, *[answer] * 20), 20) for n in range(40) for answer in range(4)]
    roots = share(rows)
    assert len(roots) == 1
    assert roots[0].cost() == 350 + 40 * (100 + 4 * 20)
    shares = deal(roots, 4)
    costs = [sum(span.cost() for span in part) for part in shares]
    assert max(costs) < 1.3 * sum(costs) / 4
    assert sum(costs) < roots[0].cost() + 8 * 350
    made = list(passes(roots, 4 * 470))
    assert made[0].parent is None
    assert len(made) < 1 + 40 * 180 / (4 * 470) * 2 + 4


def test_few_tokens_are_not_worth_a_pass():
    begin = (1,) * 15
    assert [span.row for span in share([((*begin, n), 1) for n in range(2, 90)])] == list(range(88))
    assert len(share([((1,) * 30 + (n,), 1) for n in range(2, 4)])) == 2
    assert len(share([((1,) * 80 + (n,), 1) for n in range(2, 4)])) == 1


def test_a_cache_is_gone_with_its_pass():
    rows = [((*[n] * 100, *[m] * 20), 20) for n in range(3) for m in range(4)]
    alive: list[Pass] = []
    for made in passes(share(rows), 100):
        alive = [each for each in alive if each is made.parent] + [made]
        assert len(alive) <= 2
