# Thin wiring: what is decided is in modules/plan (tested), what is built is in modules that everybody uses, pinned.
module "plan" {
  source         = "./modules/plan"
  name           = var.name
  bucket         = var.bucket
  storage_prefix = var.storage_prefix
  gpu_train      = var.gpu_train
  efa            = var.efa
  prices         = var.prices
  cost_center    = var.cost_center
  budget         = var.budget
  replica_bucket = var.replica_bucket
  history        = var.history
  teams          = keys(var.teams)
}

module "vpc" {
  source  = "terraform-aws-modules/vpc/aws"
  version = "6.6.0"

  name            = var.name
  cidr            = var.cidr
  azs             = var.availability_zones
  private_subnets = [for index, _ in var.availability_zones : cidrsubnet(var.cidr, 3, index)]
  public_subnets  = [for index, _ in var.availability_zones : cidrsubnet(var.cidr, 8, 240 + index)]

  enable_nat_gateway   = true
  single_nat_gateway   = true # only AWS APIs and public registries pass it; data and ECR's layers take the S3 endpoint below
  enable_dns_hostnames = true
  private_subnet_tags  = { "karpenter.sh/discovery" = var.name }
}

# Terabytes go to S3 past the NAT gateway, free of charge.
resource "aws_vpc_endpoint" "s3" {
  vpc_id            = module.vpc.vpc_id
  service_name      = "com.amazonaws.${var.region}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = module.vpc.private_route_table_ids
}

module "eks" {
  source  = "terraform-aws-modules/eks/aws"
  version = "21.19.0"

  name               = var.name
  kubernetes_version = var.kubernetes_version
  vpc_id             = module.vpc.vpc_id
  subnet_ids         = module.vpc.private_subnets

  endpoint_private_access      = true
  endpoint_public_access       = length(var.api_access_cidrs) > 0
  endpoint_public_access_cidrs = length(var.api_access_cidrs) > 0 ? var.api_access_cidrs : null
  enabled_log_types            = ["api", "audit", "authenticator"]

  # An apply changes versions only when the inputs say so: the module would take the most recent add-ons and machine images of the day.
  addons = {
    for name, addon in {
      coredns                   = {}
      kube-proxy                = {}
      eks-node-monitoring-agent = {} # sees a broken GPU or EFA, which node_repair_config below acts on
      eks-pod-identity-agent    = { before_compute = true }
      aws-ebs-csi-driver = { # volumes of Prometheus and Alertmanager, of the class that it makes
        configuration_values     = jsonencode({ defaultStorageClass = { enabled = true } })
        pod_identity_association = [{ role_arn = module.volumes_identity.iam_role_arn, service_account = "ebs-csi-controller-sa" }]
      }
      vpc-cni = {
        before_compute       = true
        configuration_values = jsonencode({ enableNetworkPolicy = "true" }) # without it k8s/base/walls is only paper
      }
    } : name => merge(addon, { most_recent = false, addon_version = lookup(var.addon_versions, name, null) })
  }

  access_entries = merge(
    { for index, arn in var.researcher_role_arns : "researchers-${index}" => { principal_arn = arn, kubernetes_groups = ["moonlight-researchers"] } },
    { for index, arn in var.ci_role_arns : "ci-${index}" => { principal_arn = arn, kubernetes_groups = ["moonlight-ci"] } },
    { for index, arn in var.operator_role_arns : "operators-${index}" => { principal_arn = arn, kubernetes_groups = ["moonlight-operators"] } },
    merge([for team, people in var.teams : merge(
      { for index, arn in people.researcher_role_arns : "team-${team}-researchers-${index}" => { principal_arn = arn, kubernetes_groups = ["moonlight-team-${team}-researchers"] } },
      { for index, arn in people.ci_role_arns : "team-${team}-ci-${index}" => { principal_arn = arn, kubernetes_groups = ["moonlight-team-${team}-ci"] } },
    )]...),
    {
      for index, arn in var.admin_role_arns : "admins-${index}" => {
        principal_arn = arn
        policy_associations = {
          admin = {
            policy_arn   = "arn:aws:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy"
            access_scope = { type = "cluster" }
          }
        }
      }
    },
  )

  eks_managed_node_groups = {
    for pool, group in module.plan.node_groups : pool => {
      instance_types = group.instance_types
      ami_type       = group.ami_type

      use_latest_ami_release_version = false
      ami_release_version            = lookup(var.ami_release_versions, pool, null)

      capacity_type = group.capacity_type
      min_size      = group.min_size
      max_size      = group.max_size
      desired_size  = group.desired_size
      labels        = group.labels
      taints        = group.taints
      subnet_ids    = pool == "system" ? module.vpc.private_subnets : [module.vpc.private_subnets[0]]

      network_interfaces = group.network_interfaces
      placement          = group.placement_group == null ? null : { group_name = group.placement_group }
      node_repair_config = { enabled = true }
      update_config      = { max_unavailable = 1, update_strategy = group.update_strategy }
      metadata_options   = { http_endpoint = "enabled", http_tokens = "required", http_put_response_hop_limit = 1 }

      instance_market_options = group.capacity_type == "CAPACITY_BLOCK" ? { market_type = "capacity-block" } : null
      capacity_reservation_specification = group.reservation_id == null ? null : {
        capacity_reservation_target = { capacity_reservation_id = group.reservation_id }
      }

      # Local NVMe as one volume for images, emptyDirs and logs.
      cloudinit_pre_nodeadm = pool == "system" ? null : [{
        content_type = "application/node.eks.aws"
        content      = yamlencode({ apiVersion = "node.eks.aws/v1alpha1", kind = "NodeConfig", spec = { instance = { localStorage = { strategy = "RAID0" } } } })
      }]
    }
  }

  # EFA passes no NetworkPolicy; hosts of the cluster may talk to each other on everything, nobody else may.
  node_security_group_additional_rules = {
    efa_in  = { type = "ingress", protocol = "-1", from_port = 0, to_port = 0, self = true, description = "node to node, EFA included" }
    efa_out = { type = "egress", protocol = "-1", from_port = 0, to_port = 0, self = true, description = "node to node, EFA included" }
  }
  node_security_group_tags = { "karpenter.sh/discovery" = var.name }
}

# CPU nodes and small GPUs come and go with the pods that wait (k8s/components/karpenter).
module "karpenter" {
  source  = "terraform-aws-modules/eks/aws//modules/karpenter"
  version = "21.19.0"

  cluster_name                  = module.eks.cluster_name
  namespace                     = "karpenter"
  service_account               = "karpenter"
  node_iam_role_name            = "${var.name}-karpenter-node"
  node_iam_role_use_name_prefix = false
}

# For the EBS driver, add-on aws-ebs-csi-driver above, which makes the association itself.
module "volumes_identity" {
  source  = "terraform-aws-modules/eks-pod-identity/aws"
  version = "2.8.1"

  name                      = "${var.name}-volumes"
  use_name_prefix           = false
  attach_aws_ebs_csi_policy = true
}

module "bucket" {
  source  = "terraform-aws-modules/s3-bucket/aws"
  version = "5.15.4"

  bucket                                = var.bucket
  versioning                            = { enabled = true }
  lifecycle_rule                        = module.plan.lifecycle_rules
  replication_configuration             = length(module.plan.replication) == 0 ? {} : { role = aws_iam_role.replication[0].arn, rules = module.plan.replication }
  block_public_acls                     = true
  block_public_policy                   = true
  ignore_public_acls                    = true
  restrict_public_buckets               = true
  attach_deny_insecure_transport_policy = true
  server_side_encryption_configuration = {
    rule = { apply_server_side_encryption_by_default = { sse_algorithm = "AES256" } }
  }
}

# One role a stage, reachable only by that stage's service account.
module "identity" {
  source   = "terraform-aws-modules/eks-pod-identity/aws"
  version  = "2.8.1"
  for_each = module.plan.policies

  name                    = "${var.name}-${each.key}"
  use_name_prefix         = false
  attach_custom_policy    = true
  source_policy_documents = [each.value]
  associations = {
    for account in module.plan.service_accounts[each.key] : account.namespace => {
      cluster_name    = module.eks.cluster_name
      namespace       = account.namespace
      service_account = account.name
    }
  }
}

resource "aws_ecr_repository" "image" {
  name                 = "moonlight-pipeline"
  image_tag_mutability = "IMMUTABLE"
  image_scanning_configuration {
    scan_on_push = true
  }
}

resource "aws_ecr_lifecycle_policy" "image" {
  repository = aws_ecr_repository.image.name
  policy     = module.plan.image_lifecycle
}

# Option: what took weeks is copied to a bucket in another region (docs/kubernetes.md, "Restore").
resource "aws_iam_role" "replication" {
  count = var.replica_bucket == null ? 0 : 1
  name  = "${var.name}-replication"
  assume_role_policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Action = ["sts:AssumeRole"], Principal = { Service = "s3.amazonaws.com" } }]
  })
}

resource "aws_iam_role_policy" "replication" {
  count  = var.replica_bucket == null ? 0 : 1
  name   = "replication"
  role   = aws_iam_role.replication[0].id
  policy = module.plan.replication_policy
}

resource "aws_budgets_budget" "this" {
  for_each     = module.plan.budgets
  name         = each.key
  budget_type  = each.value.budget_type
  limit_amount = each.value.limit_amount
  limit_unit   = each.value.limit_unit
  time_unit    = each.value.time_unit

  dynamic "cost_filter" {
    for_each = each.value.cost_filters
    content {
      name   = cost_filter.key
      values = cost_filter.value
    }
  }
  dynamic "notification" {
    for_each = each.value.notifications
    content {
      comparison_operator        = "GREATER_THAN"
      notification_type          = notification.value.type
      threshold                  = notification.value.threshold
      threshold_type             = "PERCENTAGE"
      subscriber_email_addresses = each.value.emails
    }
  }
}

# The columns of the bill. A tag can be activated a day after something first carried it.
resource "aws_ce_cost_allocation_tag" "this" {
  for_each = var.activate_cost_tags ? toset(module.plan.cost_tags) : toset([])
  tag_key  = each.value
  status   = "Active"
}
