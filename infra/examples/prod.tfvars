# The Moonlight preset: 256 GPUs in a Capacity Block, behind k8s/overlays/prod.
name               = "moonlight-prod"
region             = "us-east-1"
availability_zones = ["us-east-1a", "us-east-1b", "us-east-1c"]
bucket             = "moonlight"
storage_prefix     = "production"
gpu_train          = { instance_type = "p5.48xlarge", hosts = 32, capacity = "block", reservation_id = "cr-0123456789abcdef0" }
efa                = true
