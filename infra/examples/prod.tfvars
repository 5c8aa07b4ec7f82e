# The Moonlight preset: 256 GPUs in a Capacity Block, behind k8s/overlays/prod.
name               = "moonlight-prod"
region             = "us-east-1"
availability_zones = ["us-east-1a", "us-east-1b", "us-east-1c"]
bucket             = "moonlight"
storage_prefix     = "production"
gpu_train          = { instance_type = "p5.48xlarge", hosts = 32, capacity = "block", reservation_id = "cr-0123456789abcdef0" }
efa                = true
admin_role_arns    = ["arn:aws:iam::111122223333:role/platform-admin"]
api_access_cidrs   = ["203.0.113.0/24"]
budget             = { monthly_usd = 250000, emails = ["platform@example.com"] }
