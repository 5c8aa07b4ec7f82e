output "node_groups" {
  description = "Managed node groups by pool name."
  value       = local.node_groups
}

output "gpu_train_quota" {
  description = "nominalQuota of the Kueue flavor gpu-train."
  value       = local.gpu_train_quota
}

output "policies" {
  description = "IAM policy documents (JSON) by stage."
  value       = { for stage, policy in local.policies : stage => jsonencode(policy) }
}

output "service_accounts" {
  description = "Service accounts by stage, for Pod Identity associations."
  value       = local.service_accounts
}

output "lifecycle_rules" {
  description = "Lifecycle rules of the bucket."
  value       = local.lifecycle_rules
}

output "storage_root" {
  description = "storage.root of every run in this cluster."
  value       = "s3://${var.bucket}/${local.root}"
}

output "cost_per_hour" {
  description = "US dollars an hour of each pool at full size, from var.prices; null where no price was given."
  value       = local.cost_per_hour
}

output "budgets" {
  description = "Budgets by name; empty without var.budget."
  value       = local.budgets
}

output "cost_tags" {
  description = "Tags to activate as cost allocation tags."
  value       = local.cost_tags
}

output "image_lifecycle" {
  description = "Life cycle policy of the image registry (JSON)."
  value       = jsonencode(local.image_lifecycle)
}

output "replication" {
  description = "Replication rules of the bucket; empty without var.replica_bucket."
  value       = local.replication
}

output "replication_policy" {
  description = "What the replication role may do (JSON), or null."
  value       = local.replication_policy == null ? null : jsonencode(local.replication_policy)
}
