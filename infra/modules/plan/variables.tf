variable "name" {
  description = "Name of the cluster, and the beginning of every other name."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}[a-z0-9]$", var.name))
    error_message = "name must be 3-32 lower-case letters, digits or '-', starting with a letter."
  }
}

variable "bucket" {
  description = "The one bucket: corpus, tokenizers, and the pipeline's storage root."
  type        = string
  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "bucket must be a valid S3 bucket name."
  }
}

variable "storage_prefix" {
  description = "Prefix of the pipeline's storage root: storage.root = s3://<bucket>/<storage_prefix>."
  type        = string
  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]*$", var.storage_prefix))
    error_message = "storage_prefix must be one path segment of lower-case letters, digits or '-'."
  }
}

variable "input_prefixes" {
  description = "Prefixes that stages read and nobody in the cluster writes: the corpus, ready-made tokenizers."
  type        = list(string)
  default     = ["corpus", "tokenizers"]
}

variable "gpu_train" {
  description = "The training gang's hosts. capacity: on-demand, reservation (an ODCR) or block (a Capacity Block); the last two are paid whether used or not, so they never scale to zero by themselves. placement_group: name of the cluster placement group that the ODCR was made in."
  type = object({
    instance_type   = string
    hosts           = number
    capacity        = optional(string, "on-demand")
    reservation_id  = optional(string)
    placement_group = optional(string)
  })
  validation {
    condition     = contains(keys(jsondecode(file("${path.module}/instances.json")).instances), var.gpu_train.instance_type)
    error_message = "gpu_train.instance_type must be one of ${join(", ", keys(jsondecode(file("${path.module}/instances.json")).instances))} (modules/plan/instances.json)."
  }
  validation {
    condition     = var.gpu_train.hosts >= 1 && floor(var.gpu_train.hosts) == var.gpu_train.hosts
    error_message = "gpu_train.hosts must be a whole number of at least 1."
  }
  validation {
    condition     = contains(["on-demand", "reservation", "block"], var.gpu_train.capacity)
    error_message = "gpu_train.capacity must be on-demand, reservation or block."
  }
  validation {
    condition     = (var.gpu_train.capacity == "on-demand") == (var.gpu_train.reservation_id == null)
    error_message = "gpu_train.reservation_id is needed for capacity reservation and block, and for nothing else."
  }
  validation {
    condition     = var.gpu_train.placement_group == null || var.gpu_train.capacity == "reservation"
    error_message = "gpu_train.placement_group belongs to capacity reservation: AWS places a block itself, and Karpenter's hosts come one by one."
  }
}

variable "efa" {
  description = "Elastic Fabric Adapter on the training hosts (k8s/components/hosts)."
  type        = bool
  default     = true
}

variable "worker" {
  description = "What one training worker asks for, if not what instances.json says. It takes a whole host's GPUs."
  type = object({
    cpus       = number
    memory_gib = number
  })
  default = null
}

variable "cost_center" {
  description = "Value of the tag moonlight.ai/cost-center, by which the budget finds what this installation costs."
  type        = string
  default     = "moonlight"
}

variable "budget" {
  description = "US dollars a month, and who is told at 50, 80 and 100 percent of it and when the forecast passes it. null: no budget."
  type = object({
    monthly_usd = number
    emails      = list(string)
  })
  default = null
  validation {
    condition     = var.budget == null ? true : var.budget.monthly_usd > 0
    error_message = "budget.monthly_usd must be above 0."
  }
  validation {
    condition     = var.budget == null ? true : length(var.budget.emails) > 0 && alltrue([for email in var.budget.emails : can(regex("^[^@ ]+@[^@ ]+$", email))])
    error_message = "budget.emails must name at least one address: a budget that tells nobody is none."
  }
}

variable "replica_bucket" {
  description = "A versioned bucket in another region that gets a copy of models, datasets and checkpoints. null: no copy."
  type        = string
  default     = null
  validation {
    condition     = var.replica_bucket == null ? true : can(regex("^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", var.replica_bucket)) && var.replica_bucket != var.bucket
    error_message = "replica_bucket must be a valid S3 bucket name, and not the bucket itself."
  }
}

variable "prices" {
  description = "US dollars an hour by instance type, for the cost output. Fill in your own: list prices change and you may have better ones."
  type        = map(number)
  default     = {}
}

variable "history" {
  description = "Rights for KubeRay's history server and its collectors (k8s/components/history-server)."
  type        = bool
  default     = false
}

variable "teams" {
  description = "Teams with a namespace moonlight-team-<name> (k8s/teams): their stages get the same roles below the same storage root."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for team in var.teams : can(regex("^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$", team))])
    error_message = "teams: a name is 1-40 lower-case letters, digits or -, starting with a letter: it ends the name of a namespace."
  }
}
