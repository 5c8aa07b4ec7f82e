terraform {
  required_version = ">= 1.9"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.28"
    }
  }
  # State belongs in a bucket of its own: terraform init -backend-config=bucket=... (docs/kubernetes.md)
  backend "s3" {}
}

provider "aws" {
  region = var.region
  default_tags {
    tags = { "app.kubernetes.io/part-of" = "moonlight-pipeline", "moonlight.ai/cost-center" = var.cost_center }
  }
}
