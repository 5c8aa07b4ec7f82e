# One GPU host, bought by the hour and only while something runs, behind k8s/overlays/dev.
name               = "moonlight-dev"
region             = "us-east-1"
availability_zones = ["us-east-1a", "us-east-1b"]
bucket             = "moonlight-dev"
storage_prefix     = "development"
gpu_train          = { instance_type = "p5.48xlarge", hosts = 1 }
efa                = false
