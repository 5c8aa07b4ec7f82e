# What the overlays take over by hand (docs/kubernetes.md, "Install"); tests hold the committed examples together.
output "cluster_name" {
  description = "For `aws eks update-kubeconfig --name` and k8s/components/karpenter."
  value       = module.eks.cluster_name
}

output "addon_versions" {
  description = "What runs: copy it into addon_versions, and an apply changes no add-on until you do."
  value       = { for name, addon in module.eks.cluster_addons : name => addon.addon_version }
}

output "image_repository" {
  description = "newName of the image in k8s/overlays."
  value       = aws_ecr_repository.image.repository_url
}

output "storage_root" {
  description = "storage.root of the runs."
  value       = module.plan.storage_root
}

output "gpu_train_quota" {
  description = "nominalQuota of flavor gpu-train in k8s/overlays."
  value       = module.plan.gpu_train_quota
}

output "karpenter" {
  description = "Values of Karpenter's chart and of its EC2NodeClass."
  value       = { node_role = module.karpenter.node_iam_role_name, interruption_queue = module.karpenter.queue_name }
}

output "cost_per_hour" {
  description = "US dollars an hour at full size, where prices were given."
  value       = module.plan.cost_per_hour
}
