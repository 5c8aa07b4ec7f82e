"""The same run on an S3 server as in a folder: same contents, same manifests, and it resumes there."""

from pipeline.storage import Storage
from pipeline.training.commits import committed
from pipeline.training.trainer import TrainingStopped
from tests.distributed import run_distributed
from tests.training.make import Watched, tiny

PARALLELISM = {"shard": 2, "ep": 2}


def started(storage: dict, stop: bool):
    config = tiny("", steps=4, parallelism=PARALLELISM, checkpoint__async_save=True, **storage)
    try:
        return Watched().train(config, should_stop=lambda: stop)
    except TrainingStopped as stopped:
        return stopped.checkpoint


def test_as_in_a_folder(tmp_path, s3_root):
    bucket = {"storage__root": s3_root.root, "storage__endpoint_url": s3_root.endpoint_url}
    folder = {"storage__root": str(tmp_path)}
    stopped = run_distributed(started, 2, bucket, True)[0]
    assert stopped.step < 4
    assert committed(Storage(tiny("", **bucket).storage), "tiny") == [stopped]
    on_s3 = run_distributed(started, 2, bucket, False)[0]
    in_folder = run_distributed(started, 2, folder, False)[0]
    assert on_s3 == in_folder  # digests, metrics and files alike
