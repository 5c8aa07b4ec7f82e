# The bucket's layout and who reaches what in it. Prefixes are those of docs/kubernetes.md, "Security model".
locals {
  root    = var.storage_prefix
  inputs  = [for prefix in var.input_prefixes : "${prefix}/*"]
  product = ["${local.root}/tokenizers/*", "${local.root}/datasets/*"]
  runs    = ["${local.root}/runs/*"]
  models  = ["${local.root}/models/*"]
  ladders = ["${local.root}/ladders/*"] # what jobs.ladder on the submit cluster leaves
  probe   = ["${local.root}/.probe-*"]  # the writability check before a stage starts

  history = ["${local.root}/history/*"] # dashboards of clusters that are gone (k8s/components/history-server)

  # Every writer reads what it writes. Nobody writes inputs; only publish writes models; only the driver keeps step logs. Prepare reads
  # models: a run that starts from one has its tokenizer, which prepare compares with its own before it tokenizes.
  grants = {
    prepare  = { read = concat(local.inputs, local.models), write = concat(local.product, local.runs, local.probe) }
    train    = { read = concat(local.inputs, local.product, local.models), write = concat(local.runs, local.probe) }
    evaluate = { read = concat(local.inputs, local.product), write = concat(local.runs, local.probe) }
    publish  = { read = concat(local.inputs, local.product), write = concat(local.runs, local.models, local.probe) }
    driver   = { read = concat(local.inputs, local.product, local.models), write = concat(local.runs, local.ladders, local.probe, ["logs/workflows/*"]) }
    # Fluent Bit on every node; the history server, which reads what collectors of stages wrote.
    node-logs = { read = [], write = ["logs/nodes/*"] }
    history   = { read = local.history, write = [] }
  }
  granted = { for account, grant in local.grants : account => {
    read  = grant.read
    write = concat(grant.write, var.history && contains(["train", "evaluate"], account) ? local.history : [])
  } if account != "history" || var.history }

  policies = {
    for stage, grant in local.granted : stage => {
      Version = "2012-10-17"
      Statement = [for statement in [
        {
          Sid      = "Read"
          Effect   = "Allow"
          Action   = ["s3:GetObject"]
          Resource = [for prefix in concat(grant.read, grant.write) : "arn:aws:s3:::${var.bucket}/${prefix}"]
        },
        {
          Sid      = "Write"
          Effect   = "Allow"
          Action   = ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
          Resource = [for prefix in grant.write : "arn:aws:s3:::${var.bucket}/${prefix}"]
        },
        # IfExists: asking for an object that is not there answers 404 only to who may list, and such a request carries no s3:prefix.
        # With plain StringLike it would be 403, and "not there yet" would look like "forbidden" to every stage.
        {
          Sid       = "List"
          Effect    = "Allow"
          Action    = ["s3:ListBucket"]
          Resource  = ["arn:aws:s3:::${var.bucket}"]
          Condition = { StringLikeIfExists = { "s3:prefix" = concat(grant.read, grant.write, [for prefix in concat(grant.read, grant.write) : trimsuffix(prefix, "/*")]) } }
        },
      ] : statement if length(statement.Resource) > 0]
    }
  }

  workspaces = concat(["moonlight"], [for team in var.teams : "moonlight-team-${team}"])

  # Which service account is which stage (k8s/base/service-accounts.yaml).
  service_accounts = merge(
    { for stage in ["prepare", "train", "evaluate", "publish"] : stage => [for space in local.workspaces : { namespace = space, name = stage }] },
    { driver = [for space in concat(local.workspaces, ["moonlight-submit"]) : { namespace = space, name = "driver" }] },
    { node-logs = [{ namespace = "logging", name = "node-logs" }] },
    var.history ? { history = [{ namespace = "moonlight-history", name = "history" }] } : {},
  )

  # With versioning a deleted object stays, and is paid for, as an old version. Nothing of a run expires by itself: the pipeline deletes
  # checkpoints (checkpoint.keep), people delete the rest. Models keep every version.
  days_after_deletion = { runs = 7, datasets = 30 }
  lifecycle_rules = concat(
    [{
      id                                     = "unfinished-uploads"
      enabled                                = true
      filter                                 = { prefix = "" }
      abort_incomplete_multipart_upload_days = 7
    }],
    [for folder, days in local.days_after_deletion : {
      id                            = "deleted-${folder}"
      enabled                       = true
      filter                        = { prefix = "${local.root}/${folder}/" }
      noncurrent_version_expiration = { days = days }
      expiration                    = { expired_object_delete_marker = true } # the last trace of a deleted object
    }],
    [{
      id         = "logs"
      enabled    = true
      filter     = { prefix = "logs/" }
      expiration = { days = 90 }
    }],
  )

  # A copy elsewhere: what took weeks, not what can be computed again in hours. Deletions are not copied: a copy that forgets with its
  # original helps against a lost region but not against a lost mind.
  replicated = ["models", "datasets", "runs"]
  replication = var.replica_bucket == null ? [] : [
    for index, folder in local.replicated : {
      id                        = folder
      status                    = "Enabled"
      priority                  = index + 1
      delete_marker_replication = false
      filter                    = { prefix = "${local.root}/${folder}/" }
      destination               = { bucket = "arn:aws:s3:::${var.replica_bucket}", storage_class = "STANDARD_IA" }
    }
  ]
  replication_policy = var.replica_bucket == null ? null : {
    Version = "2012-10-17"
    Statement = [
      {
        Sid      = "Settings"
        Effect   = "Allow"
        Action   = ["s3:GetReplicationConfiguration", "s3:ListBucket"]
        Resource = ["arn:aws:s3:::${var.bucket}"]
      },
      {
        Sid      = "Read"
        Effect   = "Allow"
        Action   = ["s3:GetObjectVersionForReplication", "s3:GetObjectVersionAcl", "s3:GetObjectVersionTagging"]
        Resource = [for folder in local.replicated : "arn:aws:s3:::${var.bucket}/${local.root}/${folder}/*"]
      },
      {
        Sid      = "Write"
        Effect   = "Allow"
        Action   = ["s3:ReplicateObject", "s3:ReplicateTags"]
        Resource = [for folder in local.replicated : "arn:aws:s3:::${var.replica_bucket}/${local.root}/${folder}/*"]
      },
    ]
  }
}
