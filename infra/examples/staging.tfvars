# One GPU host, bought by the hour and only while something runs, behind k8s/overlays/staging.
name               = "moonlight-staging"
region             = "us-east-1"
availability_zones = ["us-east-1a", "us-east-1b"]
bucket             = "moonlight-staging"
storage_prefix     = "staging"
gpu_train          = { instance_type = "p5.48xlarge", hosts = 1 }
efa                = false
admin_role_arns    = ["arn:aws:iam::111122223333:role/platform-admin"]
api_access_cidrs   = ["203.0.113.0/24"]
