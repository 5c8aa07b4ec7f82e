variable "name" {
  description = "Name of the cluster."
  type        = string
}

variable "region" {
  description = "AWS region of cluster and bucket."
  type        = string
}

variable "availability_zones" {
  description = "At least two zones. GPUs live in the first: a gang and its placement group must not span zones."
  type        = list(string)
  validation {
    condition     = length(var.availability_zones) >= 2
    error_message = "EKS needs at least two availability zones."
  }
}

variable "cidr" {
  description = "Address range of the VPC."
  type        = string
  default     = "10.40.0.0/16"
}

variable "kubernetes_version" {
  description = "EKS version; the manifests are checked against 1.34 and 1.36."
  type        = string
  default     = "1.34"
}

variable "addon_versions" {
  description = "Versions of EKS add-ons by name, from the output addon_versions; an add-on that is not named follows AWS's default."
  type        = map(string)
  default     = {}
}

variable "ami_release_versions" {
  description = "Machine image releases by node group (system, gpu-train), e.g. 1.34.1-20260810; a group that is not named keeps what it has."
  type        = map(string)
  default     = {}
  validation {
    condition     = length(setsubtract(keys(var.ami_release_versions), ["system", "gpu-train"])) == 0
    error_message = "ami_release_versions: the node groups are system and gpu-train."
  }
}

variable "bucket" {
  description = "The one bucket; the same name stands in k8s/overlays and in the run's storage.root."
  type        = string
}

variable "storage_prefix" {
  description = "storage.root = s3://<bucket>/<storage_prefix>."
  type        = string
}

variable "gpu_train" {
  description = "The training gang's hosts, see modules/plan."
  type = object({
    instance_type   = string
    hosts           = number
    capacity        = optional(string, "on-demand")
    reservation_id  = optional(string)
    placement_group = optional(string)
  })
}

variable "efa" {
  description = "Elastic Fabric Adapter on the training hosts."
  type        = bool
  default     = true
}

variable "api_access_cidrs" {
  description = "Who may reach the API server's public endpoint; empty: it is private, and kubectl works only from inside the VPC."
  type        = list(string)
  default     = []
}

variable "researcher_role_arns" {
  description = "IAM roles whose holders are moonlight-researchers in Kubernetes (k8s/base/rbac-people.yaml)."
  type        = list(string)
  default     = []
}

variable "ci_role_arns" {
  description = "IAM roles whose holders are moonlight-ci in Kubernetes: they start runs at the lowest priority and look."
  type        = list(string)
  default     = []
}

variable "operator_role_arns" {
  description = "IAM roles whose holders are moonlight-operators in Kubernetes: who is called at night (k8s/base/rbac-operators.yaml)."
  type        = list(string)
  default     = []
}

variable "admin_role_arns" {
  description = "IAM roles with cluster administration. Whoever applies this gets in only as one of them."
  type        = list(string)
  validation {
    condition     = length(var.admin_role_arns) > 0
    error_message = "admin_role_arns must name at least one IAM role: without one nobody could administer the cluster."
  }
}

variable "cost_center" {
  description = "Value of the moonlight.ai/cost-center tag on everything."
  type        = string
  default     = "moonlight"
}

variable "prices" {
  description = "US dollars an hour by instance type, for the cost output."
  type        = map(number)
  default     = {}
}

variable "budget" {
  description = "US dollars a month, and who is told (modules/plan); null: no budget."
  type = object({
    monthly_usd = number
    emails      = list(string)
  })
  default = null
}

variable "activate_cost_tags" {
  description = "Activate the cost allocation tags. Needs the billing rights of the payer's account, and resources that carry the tags for a day."
  type        = bool
  default     = false
}

variable "replica_bucket" {
  description = "A versioned bucket in another region that gets a copy of models, datasets and runs; null: no copy."
  type        = string
  default     = null
}

variable "history" {
  description = "Rights for KubeRay's history server and its collectors (k8s/components/history-server)."
  type        = bool
  default     = false
}

variable "teams" {
  description = "Teams of k8s/teams by name, and the IAM roles whose holders are moonlight-team-<name>-researchers and moonlight-team-<name>-ci."
  type = map(object({
    researcher_role_arns = optional(list(string), [])
    ci_role_arns         = optional(list(string), [])
  }))
  default = {}
}
