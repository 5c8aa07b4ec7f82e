# Node pools: one label (moonlight.ai/node-pool) that Kueue's flavors, Karpenter's NodePools and the stage templates share.
locals {
  # The one table of instance types; k8s/components/hosts is written from it (k8s/hosts.py).
  instance_facts = jsondecode(file("${path.module}/instances.json")).instances
  train          = local.instance_facts[var.gpu_train.instance_type]
  worker         = coalesce(var.worker, local.train.worker)

  # What a host keeps for itself: kubelet, daemons, and the memory that a GPU host's agents take.
  allocatable = { cpus = local.train.cpus - 4, memory_gib = floor(local.train.memory_gib * 0.94) }

  # The first card carries the host's IP traffic too, the others EFA alone and so take no address; on p6-b300 the first card has no EFA at
  # all. Written out, because the EKS module's enable_efa_support takes every card for one with EFA, and also makes a cluster placement
  # group: hosts of a reservation that was not made in that group do not start (InsufficientInstanceCapacity; terraform-aws-eks#3730).
  # Blocks are placed together by AWS, other reservations by who makes them.
  efa_interfaces = [
    for card in range(var.efa ? local.train.first_efa_card + local.train.efa : 0) : {
      network_card_index          = card
      device_index                = card == 0 || local.train.first_efa_card > 0 ? 0 : 1
      interface_type              = card < local.train.first_efa_card ? "interface" : card == 0 ? "efa" : "efa-only"
      associate_public_ip_address = false
      delete_on_termination       = true
    }
  ]

  gpu_taint = { key = "nvidia.com/gpu", value = "true", effect = "NO_SCHEDULE" }

  # On-demand GPU hosts are Karpenter's (k8s/components/karpenter-gpu-train): they exist while a job runs. Reserved ones are a managed node
  # group that neither grows nor shrinks: they are paid for anyway, and Kueue's topology placement counts only nodes that are there.
  node_groups = merge(
    {
      # Operators, and nothing of ours: Karpenter needs a node that it does not manage.
      system = {
        instance_types     = ["m7i.2xlarge"]
        ami_type           = "AL2023_x86_64_STANDARD"
        capacity_type      = "ON_DEMAND"
        min_size           = 2
        max_size           = 4
        desired_size       = 2
        labels             = { "moonlight.ai/node-pool" = "system" }
        taints             = {}
        network_interfaces = []
        reservation_id     = null
        placement_group    = null
        update_strategy    = "DEFAULT"
      }
    },
    var.gpu_train.capacity == "on-demand" ? {} : {
      gpu-train = {
        instance_types = [var.gpu_train.instance_type]
        ami_type       = "AL2023_x86_64_NVIDIA"
        capacity_type  = var.gpu_train.capacity == "block" ? "CAPACITY_BLOCK" : "ON_DEMAND"
        min_size       = var.gpu_train.hosts
        max_size       = var.gpu_train.hosts
        desired_size   = var.gpu_train.hosts
        labels = merge(
          { "moonlight.ai/node-pool" = "gpu-train", "nvidia.com/gpu.present" = "true" },
          var.efa ? { "vpc.amazonaws.com/efa.present" = "true" } : {},
        )
        taints             = { gpu = local.gpu_taint }
        network_interfaces = local.efa_interfaces
        reservation_id     = var.gpu_train.reservation_id
        placement_group    = var.gpu_train.placement_group
        update_strategy    = "MINIMAL" # a full reservation has no host to spare: old ones go before new ones come
      }
    },
  )

  # What Kueue may hand out on the training pool: nominalQuota of flavor gpu-train.
  gpu_train_quota = {
    "cpu"                   = local.worker.cpus * var.gpu_train.hosts
    "memory_gib"            = local.worker.memory_gib * var.gpu_train.hosts
    "nvidia.com/gpu"        = local.train.gpus * var.gpu_train.hosts
    "vpc.amazonaws.com/efa" = var.efa ? local.train.efa * var.gpu_train.hosts : 0
  }

  cost_per_hour = {
    gpu-train = try(var.prices[var.gpu_train.instance_type] * var.gpu_train.hosts, null)
    system    = try(var.prices["m7i.2xlarge"] * 2, null)
  }
}

check "a_worker_fits_its_host" {
  assert {
    condition     = local.worker.cpus <= local.allocatable.cpus && local.worker.memory_gib <= local.allocatable.memory_gib
    error_message = "A worker of ${local.worker.cpus} CPUs and ${local.worker.memory_gib} GiB does not fit on ${var.gpu_train.instance_type} (${local.allocatable.cpus} CPUs, ${local.allocatable.memory_gib} GiB allocatable): lower worker, and the overlay's train with it."
  }
}
