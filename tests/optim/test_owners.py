"""Owners on random tasks: every task done once, cost within its limit, elements as level as an exhaustive search's."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.optim.owners import COST_SLACK, Task, assign


def totals(tasks, choices, world):
    cost, elements = [0] * world, [0] * world
    for task, choice in zip(tasks, choices, strict=True):
        cost[task.ranks[choice]] += task.cost
        elements[task.ranks[choice]] += task.elements
    return cost, elements


def tasks_of(sizes, world):
    return [Task(cost, elements, tuple(range(world))) for cost, elements in sizes]


sizes = st.tuples(st.integers(0, 20), st.integers(1, 20))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), world=st.integers(1, 3))
def test_elements_are_almost_as_level_as_they_can_be(sizes, world):
    tasks = tasks_of([(0, n) for n in sizes], world)
    _, elements = totals(tasks, assign(tasks, world), world)
    best = min(max(totals(tasks, choices, world)[1]) for choices in itertools.product(range(world), repeat=len(tasks)))
    assert best <= max(elements) <= best * (4 / 3 - 1 / (3 * world))  # Graham's bound for largest first


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes=st.lists(sizes, min_size=1, max_size=20), world=st.integers(1, 6))
def test_cost_stays_within_its_limit(sizes, world):
    tasks = tasks_of(sizes, world)
    cost, elements = totals(tasks, assign(tasks, world), world)
    average, largest = sum(cost) / world, max(task.cost for task in tasks)
    assert max(cost) <= max((1 + COST_SLACK) * average, average + largest) + 1e-9
    assert sum(elements) == sum(task.elements for task in tasks)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=st.lists(sizes, min_size=1, max_size=8), data=st.data())
def test_only_candidates_are_chosen_and_nothing_is_left_to_gain(sizes, data):
    """No move lowers what the busiest rank owns without another owning as much, if cost plays no part."""
    subsets = st.sampled_from([ranks for n in range(1, 5) for ranks in itertools.combinations(range(4), n)])
    tasks = [Task(0, elements, data.draw(subsets)) for _, elements in sizes]
    choices = assign(tasks, 4)
    _, elements = totals(tasks, choices, 4)
    busiest = max(elements)
    most = elements.index(busiest)
    for index, choice in enumerate(choices):
        if tasks[index].ranks[choice] == most:
            for other, rank in enumerate(tasks[index].ranks):
                moved = totals(tasks, [*choices[:index], other, *choices[index + 1 :]], 4)[1]
                assert max(moved[most], moved[rank]) >= busiest


def test_cost_goes_before_elements():
    """Two matrices of few elements and much work, two of many elements and little work: one of each to either rank."""
    tasks = tasks_of([(100, 1), (100, 1), (1, 50), (1, 50)], 2)
    assert totals(tasks, assign(tasks, 2), 2) == ([101, 101], [51, 51])


def test_work_that_replicas_share_fills_what_matrices_leave():
    """Experts that stay (no elements) go to the replica with fewer dense matrices."""
    dense = [Task(60, 10, (0, 1)), Task(20, 5, (0, 1))]
    experts = [Task(20, 0, (0, 1))] * 6
    cost, elements = totals(dense + experts, assign([*dense, *experts], 2), 2)
    assert cost == [100, 100]
    assert sorted(elements) in ([5, 10], [0, 15])
