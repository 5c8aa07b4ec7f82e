variables {
  name           = "moonlight-prod"
  bucket         = "moonlight"
  storage_prefix = "production"
  gpu_train      = { instance_type = "p5.48xlarge", hosts = 32, capacity = "block", reservation_id = "cr-0123456789abcdef0" }
  prices         = { "p5.48xlarge" = 50 }
}

run "a_reserved_pool_neither_grows_nor_shrinks" {
  command = plan
  assert {
    condition     = output.node_groups["gpu-train"].min_size == 32 && output.node_groups["gpu-train"].max_size == 32
    error_message = "reserved hosts must be min = max"
  }
  assert {
    condition     = output.node_groups["gpu-train"].capacity_type == "CAPACITY_BLOCK"
    error_message = "a block is capacity type CAPACITY_BLOCK"
  }
  assert {
    condition     = output.node_groups["gpu-train"].labels["moonlight.ai/node-pool"] == "gpu-train" && output.node_groups["gpu-train"].taints.gpu.key == "nvidia.com/gpu"
    error_message = "label and taint of the pool"
  }
  assert {
    condition     = output.cost_per_hour["gpu-train"] == 1600 && output.cost_per_hour["system"] == null
    error_message = "cost is price times hosts, null without a price"
  }
}

run "quota_is_hosts_times_what_a_worker_takes" {
  command = plan
  assert {
    condition     = output.gpu_train_quota == { "cpu" = 3072, "memory_gib" = 32000, "nvidia.com/gpu" = 256, "vpc.amazonaws.com/efa" = 1024 }
    error_message = "quota of 32 p5.48xlarge"
  }
}

run "every_network_card_has_one_efa_interface_and_the_first_an_address" {
  command = plan
  variables {
    gpu_train = { instance_type = "p5en.48xlarge", hosts = 4, capacity = "reservation", reservation_id = "cr-0123456789abcdef0", placement_group = "gang" }
  }
  assert {
    condition     = jsonencode(output.node_groups["gpu-train"].network_interfaces[*].network_card_index) == jsonencode(range(16))
    error_message = "p5en has 16 network cards"
  }
  assert {
    condition     = alltrue([for index, card in output.node_groups["gpu-train"].network_interfaces : card.interface_type == (index == 0 ? "efa" : "efa-only") && card.device_index == min(index, 1)])
    error_message = "one interface carries IP, the others do not"
  }
  assert {
    condition     = output.node_groups["gpu-train"].placement_group == "gang" && output.node_groups["gpu-train"].update_strategy == "MINIMAL"
    error_message = "hosts of a reservation start in its placement group, and are replaced without a spare one"
  }
}

run "without_efa_there_is_none" {
  command = plan
  variables {
    efa = false
  }
  assert {
    condition     = output.gpu_train_quota["vpc.amazonaws.com/efa"] == 0 && !contains(keys(output.node_groups["gpu-train"].labels), "vpc.amazonaws.com/efa.present")
    error_message = "no EFA quota and label"
  }
  assert {
    condition     = output.node_groups["gpu-train"].network_interfaces == []
    error_message = "the instance type's own interface"
  }
}

run "on_demand_hosts_are_karpenters" {
  command = plan
  variables {
    gpu_train = { instance_type = "p4d.24xlarge", hosts = 2 }
  }
  assert {
    condition     = keys(output.node_groups) == ["system"] && output.gpu_train_quota["vpc.amazonaws.com/efa"] == 8
    error_message = "no managed group for on-demand hosts; p4d has 4 interfaces"
  }
}

run "nobody_writes_inputs_and_only_publish_writes_models" {
  command = plan
  assert {
    condition = alltrue([
      for policy in values(output.policies) : alltrue([
        for resource in [for s in jsondecode(policy).Statement : s if s.Sid == "Write"][0].Resource :
        !startswith(resource, "arn:aws:s3:::moonlight/corpus") && !startswith(resource, "arn:aws:s3:::moonlight/tokenizers")
      ])
    ])
    error_message = "inputs are read-only"
  }
  assert {
    condition = [
      for stage, policy in output.policies : stage
      if anytrue([for r in [for s in jsondecode(policy).Statement : s if s.Sid == "Write"][0].Resource : strcontains(r, "/models/")])
    ] == ["publish"]
    error_message = "only publish writes models"
  }
  assert {
    condition = alltrue([
      for policy in values(output.policies) : alltrue([
        for s in jsondecode(policy).Statement : alltrue([for a in s.Action : a != "*" && a != "s3:*"]) && alltrue([for r in s.Resource : r != "*"])
      ])
    ])
    error_message = "no wildcard actions or resources"
  }
}

run "missing_objects_are_missing_not_forbidden" {
  command = plan
  assert {
    condition     = alltrue([for policy in values(output.policies) : [for s in jsondecode(policy).Statement : keys(s.Condition)[0] if s.Sid == "List"] == ["StringLikeIfExists"]])
    error_message = "HEAD of a missing object carries no s3:prefix"
  }
}

run "nothing_expires_but_logs_and_what_was_deleted" {
  command = plan
  assert {
    condition     = [for rule in output.lifecycle_rules : rule.filter.prefix if try(rule.expiration.days, null) != null] == ["logs/"]
    error_message = "current objects: logs only"
  }
  assert {
    condition     = toset([for rule in output.lifecycle_rules : rule.filter.prefix if can(rule.noncurrent_version_expiration)]) == toset(["production/runs/", "production/datasets/"])
    error_message = "old versions of models stay"
  }
  assert {
    condition     = [for rule in output.lifecycle_rules : rule.filter.prefix if can(rule.abort_incomplete_multipart_upload_days)] == [""]
    error_message = "unfinished uploads, wherever they are"
  }
  assert {
    condition     = alltrue([for rule in output.lifecycle_rules : rule.enabled]) && length(distinct(output.lifecycle_rules[*].id)) == 4
    error_message = "every rule is on and has an id of its own"
  }
}

run "unknown_hardware" {
  command = plan
  variables {
    gpu_train = { instance_type = "p3.2xlarge", hosts = 1 }
  }
  expect_failures = [var.gpu_train]
}

run "half_a_host" {
  command = plan
  variables {
    gpu_train = { instance_type = "p5.48xlarge", hosts = 1.5 }
  }
  expect_failures = [var.gpu_train]
}

run "a_block_without_its_reservation" {
  command = plan
  variables {
    gpu_train = { instance_type = "p5.48xlarge", hosts = 1, capacity = "block" }
  }
  expect_failures = [var.gpu_train]
}

run "a_placement_group_for_a_block" {
  command = plan
  variables {
    gpu_train = { instance_type = "p5.48xlarge", hosts = 1, capacity = "block", reservation_id = "cr-0123456789abcdef0", placement_group = "gang" }
  }
  expect_failures = [var.gpu_train]
}

run "a_worker_too_large_for_its_host" {
  command = plan
  variables {
    gpu_train = { instance_type = "p4d.24xlarge", hosts = 1 }
    worker    = { cpus = 96, memory_gib = 1000 }
  }
  expect_failures = [check.a_worker_fits_its_host]
}

run "a_bad_bucket_name" {
  command = plan
  variables {
    bucket = "Moonlight_Data"
  }
  expect_failures = [var.bucket]
}

run "a_bad_prefix" {
  command = plan
  variables {
    storage_prefix = "a/b"
  }
  expect_failures = [var.storage_prefix]
}

run "p4d_24xlarge_has_its_4_interfaces_and_a_worker_that_fits" {
  command = plan
  variables {
    gpu_train = { instance_type = "p4d.24xlarge", hosts = 2, capacity = "block", reservation_id = "cr-0123456789abcdef0" }
  }
  assert {
    condition     = output.gpu_train_quota["vpc.amazonaws.com/efa"] == 8 && output.gpu_train_quota["nvidia.com/gpu"] == 16
    error_message = "4 EFA interfaces and 8 GPUs a host"
  }
  assert {
    condition     = length([for card in output.node_groups["gpu-train"].network_interfaces : card if startswith(card.interface_type, "efa")]) == 4
    error_message = "as many as the quota says"
  }
}

run "p4de_24xlarge_has_its_4_interfaces_and_a_worker_that_fits" {
  command = plan
  variables {
    gpu_train = { instance_type = "p4de.24xlarge", hosts = 2, capacity = "block", reservation_id = "cr-0123456789abcdef0" }
  }
  assert {
    condition     = output.gpu_train_quota["vpc.amazonaws.com/efa"] == 8 && output.gpu_train_quota["nvidia.com/gpu"] == 16
    error_message = "4 EFA interfaces and 8 GPUs a host"
  }
  assert {
    condition     = length([for card in output.node_groups["gpu-train"].network_interfaces : card if startswith(card.interface_type, "efa")]) == 4
    error_message = "as many as the quota says"
  }
}

run "p5_48xlarge_has_its_32_interfaces_and_a_worker_that_fits" {
  command = plan
  variables {
    gpu_train = { instance_type = "p5.48xlarge", hosts = 2, capacity = "block", reservation_id = "cr-0123456789abcdef0" }
  }
  assert {
    condition     = output.gpu_train_quota["vpc.amazonaws.com/efa"] == 64 && output.gpu_train_quota["nvidia.com/gpu"] == 16
    error_message = "32 EFA interfaces and 8 GPUs a host"
  }
  assert {
    condition     = length([for card in output.node_groups["gpu-train"].network_interfaces : card if startswith(card.interface_type, "efa")]) == 32
    error_message = "as many as the quota says"
  }
}

run "p5e_48xlarge_has_its_32_interfaces_and_a_worker_that_fits" {
  command = plan
  variables {
    gpu_train = { instance_type = "p5e.48xlarge", hosts = 2, capacity = "block", reservation_id = "cr-0123456789abcdef0" }
  }
  assert {
    condition     = output.gpu_train_quota["vpc.amazonaws.com/efa"] == 64 && output.gpu_train_quota["nvidia.com/gpu"] == 16
    error_message = "32 EFA interfaces and 8 GPUs a host"
  }
  assert {
    condition     = length([for card in output.node_groups["gpu-train"].network_interfaces : card if startswith(card.interface_type, "efa")]) == 32
    error_message = "as many as the quota says"
  }
}

run "p5en_48xlarge_has_its_16_interfaces_and_a_worker_that_fits" {
  command = plan
  variables {
    gpu_train = { instance_type = "p5en.48xlarge", hosts = 2, capacity = "block", reservation_id = "cr-0123456789abcdef0" }
  }
  assert {
    condition     = output.gpu_train_quota["vpc.amazonaws.com/efa"] == 32 && output.gpu_train_quota["nvidia.com/gpu"] == 16
    error_message = "16 EFA interfaces and 8 GPUs a host"
  }
  assert {
    condition     = length([for card in output.node_groups["gpu-train"].network_interfaces : card if startswith(card.interface_type, "efa")]) == 16
    error_message = "as many as the quota says"
  }
}

run "p6_b200_48xlarge_has_its_8_interfaces_and_a_worker_that_fits" {
  command = plan
  variables {
    gpu_train = { instance_type = "p6-b200.48xlarge", hosts = 2, capacity = "block", reservation_id = "cr-0123456789abcdef0" }
  }
  assert {
    condition     = output.gpu_train_quota["vpc.amazonaws.com/efa"] == 16 && output.gpu_train_quota["nvidia.com/gpu"] == 16
    error_message = "8 EFA interfaces and 8 GPUs a host"
  }
  assert {
    condition     = length([for card in output.node_groups["gpu-train"].network_interfaces : card if startswith(card.interface_type, "efa")]) == 8
    error_message = "as many as the quota says"
  }
}

run "p6_b300_48xlarge_has_its_16_interfaces_and_a_worker_that_fits" {
  command = plan
  variables {
    gpu_train = { instance_type = "p6-b300.48xlarge", hosts = 2, capacity = "block", reservation_id = "cr-0123456789abcdef0" }
  }
  assert {
    condition     = output.gpu_train_quota["vpc.amazonaws.com/efa"] == 32 && output.gpu_train_quota["nvidia.com/gpu"] == 16
    error_message = "16 EFA interfaces and 8 GPUs a host"
  }
  assert {
    condition     = length([for card in output.node_groups["gpu-train"].network_interfaces : card if startswith(card.interface_type, "efa")]) == 16
    error_message = "as many as the quota says"
  }
}

run "the_first_card_of_p6_b300_carries_no_efa" {
  command = plan
  variables {
    gpu_train = { instance_type = "p6-b300.48xlarge", hosts = 1, capacity = "block", reservation_id = "cr-0123456789abcdef0" }
  }
  assert {
    condition     = output.node_groups["gpu-train"].network_interfaces[0].interface_type == "interface" && length(output.node_groups["gpu-train"].network_interfaces) == 17
    error_message = "17 cards, the first for IP"
  }
  assert {
    condition     = alltrue([for card in output.node_groups["gpu-train"].network_interfaces : card.device_index == 0])
    error_message = "each interface is the first of its card"
  }
}

run "no_budget_unless_asked_for" {
  command = plan
  assert {
    condition     = length(output.budgets) == 0 && length(output.replication) == 0 && output.replication_policy == null
    error_message = "budget and replication are options"
  }
}

run "a_budget_tells_before_it_is_spent" {
  command = plan
  variables {
    cost_center = "research"
    budget      = { monthly_usd = 250000, emails = ["platform@example.com"] }
  }
  assert {
    condition     = output.budgets["moonlight-prod"].limit_amount == "250000" && output.budgets["moonlight-prod"].cost_filters.TagKeyValue == ["user:moonlight.ai/cost-center$research"]
    error_message = "the amount, of this cost centre"
  }
  assert {
    condition     = [for n in output.budgets["moonlight-prod"].notifications : "${n.type} ${n.threshold}"] == ["ACTUAL 50", "ACTUAL 80", "ACTUAL 100", "FORECASTED 100"]
    error_message = "thresholds"
  }
}

run "a_budget_that_tells_nobody" {
  command = plan
  variables {
    budget = { monthly_usd = 1000, emails = [] }
  }
  expect_failures = [var.budget]
}

run "a_budget_of_nothing" {
  command = plan
  variables {
    budget = { monthly_usd = 0, emails = ["platform@example.com"] }
  }
  expect_failures = [var.budget]
}

run "released_images_stay" {
  command = plan
  assert {
    condition     = alltrue([for rule in jsondecode(output.image_lifecycle).rules : rule.selection.tagStatus == "untagged" || try(rule.selection.tagPrefixList, []) == ["ci-"]])
    error_message = "only untagged images and CI's builds expire"
  }
}

run "a_copy_elsewhere" {
  command = plan
  variables {
    replica_bucket = "moonlight-replica"
  }
  assert {
    condition     = [for rule in output.replication : rule.filter.prefix] == ["production/models/", "production/datasets/", "production/runs/"] && alltrue([for rule in output.replication : !rule.delete_marker_replication])
    error_message = "what took weeks, and no deletions"
  }
  assert {
    condition     = alltrue([for s in jsondecode(output.replication_policy).Statement : alltrue([for r in s.Resource : r != "*"])])
    error_message = "the role reaches nothing else"
  }
}

run "a_copy_onto_itself" {
  command = plan
  variables {
    replica_bucket = "moonlight"
  }
  expect_failures = [var.replica_bucket]
}

run "the_history_server_reads_what_collectors_write" {
  command = plan
  variables {
    history = true
  }
  assert {
    condition     = [for s in jsondecode(output.policies["history"]).Statement : s.Sid] == ["Read", "List"] && output.service_accounts["history"] == [{ namespace = "moonlight-history", name = "history" }]
    error_message = "the server writes nothing"
  }
  assert {
    condition     = toset([for account, policy in output.policies : account if anytrue([for s in jsondecode(policy).Statement : anytrue([for r in s.Resource : strcontains(r, "/history/")]) if s.Sid == "Write"])]) == toset(["evaluate", "train"])
    error_message = "collectors stand beside train and evaluate"
  }
}

run "nodes_write_their_logs_and_nothing_else" {
  command = plan
  assert {
    condition     = alltrue([for s in jsondecode(output.policies["node-logs"]).Statement : s.Sid == "List" || s.Resource == ["arn:aws:s3:::moonlight/logs/nodes/*"]])
    error_message = "logs/nodes/ only"
  }
  assert {
    condition     = !contains(keys(output.policies), "history")
    error_message = "off by default"
  }
}

run "a_team_has_the_stages_of_its_own_namespace" {
  command = plan
  variables {
    teams = ["north"]
  }
  assert {
    condition     = output.service_accounts["train"] == [{ namespace = "moonlight", name = "train" }, { namespace = "moonlight-team-north", name = "train" }]
    error_message = "train of team north must have train's role"
  }
  assert {
    condition     = [for account in output.service_accounts["driver"] : account.namespace] == ["moonlight", "moonlight-team-north", "moonlight-submit"]
    error_message = "drivers of all workspaces must have the driver's role"
  }
}

run "a_teams_name_ends_a_namespaces" {
  command = plan
  variables {
    teams = ["North"]
  }
  expect_failures = [var.teams]
}
