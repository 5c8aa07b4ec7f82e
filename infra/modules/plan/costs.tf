# What is spent, and who hears of it. Costs by run: the tag and the pods' label moonlight.ai/run-id (docs/kubernetes.md, "Costs").
locals {
  # One budget over everything with this installation's cost centre. Actual costs at half, four fifths and all of it, and the forecast.
  budgets = var.budget == null ? {} : {
    (var.name) = {
      limit_amount = tostring(var.budget.monthly_usd)
      limit_unit   = "USD"
      time_unit    = "MONTHLY"
      budget_type  = "COST"
      cost_filters = { TagKeyValue = [join("$", ["user:moonlight.ai/cost-center", var.cost_center])] }
      notifications = concat(
        [for percent in [50, 80, 100] : { type = "ACTUAL", threshold = percent }],
        [{ type = "FORECASTED", threshold = 100 }],
      )
      emails = var.budget.emails
    }
  }

  # Tags that the billing console shows a column of, once they are activated there.
  cost_tags = ["moonlight.ai/cost-center", "app.kubernetes.io/part-of"]

  # Images that no tag names any more are a build that was replaced. Tagged ones are what digests in Git point to, so they stay, but for
  # those that CI tags by commit: enough are kept to go back.
  image_lifecycle = {
    rules = [
      {
        rulePriority = 1
        description  = "untagged"
        selection    = { tagStatus = "untagged", countType = "sinceImagePushed", countUnit = "days", countNumber = 14 }
        action       = { type = "expire" }
      },
      {
        rulePriority = 2
        description  = "builds of CI that were not released"
        selection    = { tagStatus = "tagged", tagPrefixList = ["ci-"], countType = "imageCountMoreThan", countNumber = 100 }
        action       = { type = "expire" }
      },
    ]
  }
}
