"""`jobs.verify --checkpoints` and `--models` on a real Ray: sound ones, flipped bits, torn records."""

from pathlib import Path

import pytest
import ray

from jobs import verify
from pipeline.config.load import dump_yaml
from pipeline.training.commits import step_folder
from tests.publishing.conftest import published


@pytest.fixture
def ray_running():
    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    yield
    ray.shutdown()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def test_on_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_running: None) -> None:
    run = published(str(tmp_path / "root"))
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(run.made.config))
    name = f"model {run.manifest.name} {run.manifest.version}"
    arguments = ["--config", str(file)]

    assert verify.main([*arguments, "--checkpoints"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["verify: checkpoint of step 50 is sound"]
    assert verify.main([*arguments, "--models"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"verify: {name} is sound"]

    [part] = Path(run.made.storage.uri(step_folder("made", 50))).rglob("__0_0.distcp")
    flip(part)
    assert verify.main([*arguments, "--checkpoints"]) == 1
    _, damaged, result = capsys.readouterr().out.splitlines()
    assert damaged.startswith(f"verify: DAMAGED {part}: ")
    assert result == "verify: checkpoint of step 50 is NOT sound"
    part.unlink()
    manifest = part.parents[1] / "manifest.json"
    manifest.write_bytes(b"{")
    assert verify.main([*arguments, "--checkpoints"]) == 1
    assert f"{manifest}: not a sound CheckpointManifest" in capsys.readouterr().out

    flip(run.folder / "config.json")
    assert verify.main([*arguments, "--models"]) == 1
    assert f"verify: DAMAGED {run.folder / 'config.json'}: sha256 is" in capsys.readouterr().out
