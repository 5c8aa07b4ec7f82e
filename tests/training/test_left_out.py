"""Going back on a spike is the run that had left the data out from the beginning, however it is interrupted."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage import Storage
from pipeline.training import going_back, trainer
from pipeline.training.commits import committed, manifest_path
from pipeline.training.guard import RunDiverged
from pipeline.training.left_out import left_out_path, read_left_out, union
from pipeline.workflow.record import read_events
from tests.training.make import BATCH, Watched, spiking_data, tiny

STEPS, SPIKES_AT = 20, 14  # the spike's step, of checkpoints at 4, 8, 12, ...
GO_BACK = {"action": "go_back", "horizon_steps": 10}
RANGE = (12 * BATCH, 14 * BATCH)


@pytest.fixture
def bad_data(monkeypatch):
    return spiking_data(monkeypatch)


def run(root, **more):
    return tiny(
        str(root),
        steps=STEPS,
        **{"training__spikes": GO_BACK, "checkpoint__every_steps": 4, "checkpoint__keep": 9, **more},
    )


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The run that leaves the range out by its configuration, and never spikes."""
    root = tmp_path_factory.mktemp("without")
    manifest = Watched().train(run(root, training__skip_sequences=(RANGE,)))
    return manifest, root


def same_end(root, manifest, without) -> None:
    assert manifest.checkpoint.content_sha256 == without[0].checkpoint.content_sha256
    assert manifest.checkpoint.left_out == (RANGE,)
    (lines, expected) = (
        [
            json.loads(line)
            for file in found.metrics
            for line in Storage(run(place).storage).read(file.path).splitlines()
        ]
        for found, place in ((manifest, root), (without[0], without[1]))
    )
    assert lines == expected


@pytest.mark.parametrize("asynchronous", [False, True])
def test_as_if_it_had_been_left_out_from_the_beginning(tmp_path, bad_data, without, capsys, asynchronous):
    bad_data(13 * BATCH)
    manifest = Watched().train(run(tmp_path, checkpoint__async_save=asynchronous))
    same_end(tmp_path, manifest, without)
    storage = Storage(run(tmp_path).storage)
    (detour,) = read_left_out(storage, "tiny").detours
    assert (detour.spike, detour.back_to, detour.left_out) == (14, 12, RANGE)
    assert detour.loss > 50
    assert [manifest.left_out for manifest in committed(storage, "tiny")] == [(), (), (), (RANGE,), (RANGE,)]
    said = capsys.readouterr().err
    assert "step 14: loss 5" in said
    assert (
        "goes back to the checkpoint of step 12 and leaves positions 96 to 112 of the data out (1 of at most 3 times)"
        in said
    )
    assert "jobs.inspect ... position 96 to 111" in said
    assert [event["back_to"] for event in read_events(storage, "tiny") if event["event"] == "went back"] == [12]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_when_it_decides(tmp_path, bad_data, without, monkeypatch, moment):
    """Before the record is written nothing has happened; after it everything has."""
    bad_data(13 * BATCH)
    deciding = going_back.decide

    class Killed(Exception):
        pass

    def killed(*arguments):
        if moment == "after":
            deciding(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "decide", killed)
        with pytest.raises(Killed):
            Watched().train(run(tmp_path))
    same_end(tmp_path, Watched().train(run(tmp_path)), without)


def test_checkpoints_of_a_way_that_was_left_do_not_count(tmp_path, bad_data, without):
    """At least five steps back: to step 8 although 12 is there; killed when that was decided, 12 is not gone on from."""
    bad_data(13 * BATCH)
    wide = (8 * BATCH, 14 * BATCH)
    settings = {"training__spikes": {**GO_BACK, "go_back_steps": 5}}
    seen = Watched()
    manifest = seen.train(run(tmp_path, **settings))
    assert manifest.checkpoint.left_out == (wide,)
    assert [progress.step for progress in seen.progress][13:15] == [14, 9]
    storage = Storage(run(tmp_path).storage)
    stale = manifest.checkpoint.model_copy(update={"step": 12, "left_out": ()})
    assert read_left_out(storage, "tiny").is_stale(stale)
    assert not read_left_out(storage, "tiny").is_stale(manifest.checkpoint)
    twin = Watched().train(run(tmp_path / "twin", training__skip_sequences=(wide,)))
    assert twin.checkpoint.content_sha256 == manifest.checkpoint.content_sha256
    storage.write(manifest_path("tiny", 20), manifest.checkpoint.model_copy(update={"left_out": ()}).to_json())
    assert Watched().train(run(tmp_path, **settings)).checkpoint.content_sha256 == twin.checkpoint.content_sha256


def test_back_to_the_beginning(tmp_path, bad_data):
    """A spike before the first checkpoint."""
    bad_data(11 * BATCH)
    manifest = Watched().train(run(tmp_path, checkpoint__every_steps=100))
    twin = Watched().train(run(tmp_path / "twin", training__skip_sequences=((0, 12 * BATCH),)))
    assert twin.checkpoint.content_sha256 == manifest.checkpoint.content_sha256


def test_a_branch_does_not_go_back_on_its_parents_spikes(tmp_path, bad_data):
    """The parent met one, counted it and went on; the branch has its counters, and goes back on the next one alone."""
    bad_data(13 * BATCH)
    Watched().train(run(tmp_path, run_id="base", training__spikes={**GO_BACK, "action": "skip"}))
    storage = Storage(run(tmp_path).storage)
    calm = run(tmp_path, run_id="calm", training__start_from="base@16")
    seen = Watched()
    seen.train(calm)
    assert [progress.step for progress in seen.progress] == [17, 18, 19, 20]
    assert [progress.spikes for progress in seen.progress] == [1] * 4
    assert read_left_out(storage, "calm").detours == ()
    bad_data(17 * BATCH)
    Watched().train(run(tmp_path, run_id="child", training__start_from="base@16"))
    (detour,) = read_left_out(storage, "child").detours
    assert (detour.spike, detour.back_to, detour.left_out) == (18, 0, (16 * BATCH, 18 * BATCH))


def test_the_limit_ends_the_run(tmp_path, bad_data):
    """Each going back meets other bad data."""
    bad_data(*(position * BATCH for position in (13, 15, 17)))
    with pytest.raises(
        RunDiverged, match=r"step 14: loss .* has gone back 2 times already \(training.spikes.go_back_limit\)"
    ):
        Watched().train(run(tmp_path, training__spikes={**GO_BACK, "go_back_limit": 2}))
    ranges = read_left_out(Storage(run(tmp_path).storage), "tiny").ranges
    assert ranges == ((96, 112), (112, 128))


def test_without_other_data_the_run_ends(tmp_path, bad_data):
    bad_data(13 * BATCH)
    sources = [{"name": name, "path": "none", "max_epochs": epochs} for name, epochs in (("s0", 1.26), ("s1", 1.26))]
    with pytest.raises(RunDiverged, match="there is no data to go on with instead: source 's0' would be seen"):
        Watched().train(run(tmp_path, corpus={"sources": sources}))
    assert not Storage(run(tmp_path).storage).exists(left_out_path("tiny"))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10))))
def test_union(pairs):
    ranges = [(begin, begin + length) for begin, length in pairs]
    found = union(ranges)
    assert {n for begin, end in found for n in range(begin, end)} == {
        n for begin, end in ranges for n in range(begin, end)
    }
    assert all(first[1] < second[0] for first, second in zip(found, found[1:]))
