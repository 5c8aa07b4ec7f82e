"""The same run on an S3 server as in a folder: same contents, same manifests, and it resumes there."""

import pytest
import torch
from safetensors.torch import save

from pipeline.model.hf import hf_tensors
from pipeline.storage import Storage
from pipeline.training.commits import committed
from pipeline.training.trainer import Run, TrainingStopped
from tests.distributed import run_distributed
from tests.training.make import Watched, tiny, tiny_dataset

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
    assert list(committed(Storage(tiny("", **bucket).storage), "tiny")) == [stopped]
    on_s3 = run_distributed(started, 2, bucket, False)[0]
    in_folder = run_distributed(started, 2, folder, False)[0]
    assert (on_s3.digest, on_s3.metrics) == (in_folder.digest, in_folder.metrics)
    assert [file.bytes for file in on_s3.checkpoint.files] == [file.bytes for file in in_folder.checkpoint.files]


def test_starts_from_published_weights(tmp_path, s3_root):
    """`s3://` as the place of the weights, whatever the run's own root; and a folder there that holds none."""
    bucket = {"storage__root": s3_root.root, "storage__endpoint_url": s3_root.endpoint_url}
    storage = Storage(tiny("", **bucket).storage)
    dataset = tiny_dataset(storage)
    source = Run(tiny("", **bucket), dataset, storage)
    tensors = {name: tensor.contiguous() for name, tensor in hf_tensors(source.model)}
    storage.write("release/model.safetensors", save(tensors))
    source.close()

    elsewhere = {"storage__root": str(tmp_path), "storage__endpoint_url": s3_root.endpoint_url, "seed": 7}
    config = tiny("", training__initial_weights=f"{s3_root.root}/release", **elsewhere)
    run = Run(config, tiny_dataset(Storage(config.storage)), Storage(config.storage))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in hf_tensors(run.model))
    run.close()
    config = tiny("", training__initial_weights=f"{s3_root.root}/nothing", **elsewhere)
    with pytest.raises(ValueError, match=r"s3://.*/nothing: no \*.safetensors file; give a Hugging Face model folder"):
        Run(config, dataset, Storage(config.storage))
