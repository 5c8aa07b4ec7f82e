# No provider: everything here is arithmetic and text, so `terraform test` proves it without an account.
terraform {
  required_version = ">= 1.9"
}
