#!/usr/bin/env bash
# Promote one commit, and with it the image's digest (k8s/components/image), from one environment to the next:
#   k8s/promote.sh main staging    k8s/promote.sh staging production
# The branch moves forward or not at all. What gates it (make e2e, make conformance) is your CI's business: k8s/ci/github.yaml.
set -euo pipefail
from=${1:?"the branch to promote, e.g. main"} to=${2:?"the branch to move, e.g. staging"} remote=${REMOTE:-origin}
case "$from $to" in
  "main staging" | "staging production") ;;
  *) echo "error: main goes to staging, staging to production; not $from to $to" >&2; exit 2 ;;
esac
git fetch --quiet "$remote"
commit=$(git rev-parse --verify --quiet "refs/remotes/$remote/$from") || { echo "error: $remote has no branch $from" >&2; exit 2; }
digest=$(git show "$commit:k8s/components/image/kustomization.yaml" | sed -n 's/^ *digest: //p')
if [[ ! $digest =~ ^sha256:[0-9a-f]{64}$ || $digest =~ ^sha256:0+$ ]]; then
  echo "error: k8s/components/image of $commit names no image (digest ${digest:-missing}): push one and commit its digest" >&2
  exit 2
fi
before=$(git rev-parse --verify --quiet "refs/remotes/$remote/$to" || true)
if [[ -n $before ]] && ! git merge-base --is-ancestor "$before" "$commit"; then
  echo "error: $to ($before) is not an ancestor of $from ($commit): somebody committed to $to itself" >&2
  exit 1
fi
git push --quiet "$remote" "$commit:refs/heads/$to"
echo "$to: ${before:-nothing} -> $commit, image $digest"
