#!/usr/bin/env bash
# The debug pipeline end to end on a real cluster, through Kueue, KubeRay and Argo, with an S3 server inside it.
#
#   make e2e-kind                     makes a kind cluster, builds and loads the image, then all below
#   make e2e                          uses the cluster of KUBECONFIG; IMAGE must be one that its nodes can pull
#   PIP_ARGS="--extra-index-url ..." make e2e-kind   with PyTorch's index of CPU builds: an image that is 5 GB smaller
#   INSTALL_OPERATORS=no make e2e     leaves KubeRay, Kueue and Argo Workflows as they are
#   k8s/e2e/e2e.sh retrain            after it: a second run, from the model that the first one published
#   k8s/e2e/e2e.sh clean              takes our objects out of the cluster again; teardown deletes the kind cluster
#
# Each step is a function and can be run alone: k8s/e2e/e2e.sh verify. Everything may be run again: objects are applied anew, and what
# earlier runs left is forgotten first.
set -euo pipefail
cd "$(dirname "$0")/../.."

IMAGE=${IMAGE:-moonlight-pipeline:e2e}
INSTALL_OPERATORS=${INSTALL_OPERATORS:-yes}
TIMEOUT=${TIMEOUT:-5400} # seconds for the whole run

say() { printf '\n== %s\n' "$*"; }

give_up() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

cluster() {
  say "kind cluster"
  kind get clusters | grep -x moonlight || kind create cluster --config k8s/e2e/kind.yaml --wait 5m
  kind export kubeconfig --name moonlight # one that was there already may not be the current context
}

image() {
  say "image ${IMAGE}"
  docker build --tag "${IMAGE}" --build-arg BASE=rayproject/ray:2.60.0-py311 \
    --build-arg PIP_ARGS="${PIP_ARGS:-}" \
    --build-arg GIT_COMMIT="$(git rev-parse HEAD)" .
  kind load docker-image "${IMAGE}" --name moonlight
}

operators() {
  say "operators on $(kubectl config current-context)"
  kubectl apply --filename k8s/base/namespaces.yaml
  if [ "${INSTALL_OPERATORS}" != yes ]; then
    for crd in rayjobs.ray.io clusterqueues.kueue.x-k8s.io workflows.argoproj.io; do
      kubectl get crd "${crd}" > /dev/null || give_up "INSTALL_OPERATORS=${INSTALL_OPERATORS}, but the cluster has no ${crd}: install its operator"
    done
    return
  fi
  helm upgrade --install kuberay-operator kuberay-operator --repo https://ray-project.github.io/kuberay-helm --version 1.7.0 \
    --namespace kuberay-system --create-namespace --wait --timeout 10m
  helm upgrade --install kueue oci://registry.k8s.io/kueue/charts/kueue --version 0.19.2 \
    --namespace kueue-system --create-namespace --wait --timeout 10m \
    --set-file managerConfig.controllerManagerConfigYaml=k8s/queues/manager-config.yaml
  helm upgrade --install argo-workflows argo-workflows --repo https://argoproj.github.io/argo-helm --version 1.0.18 \
    --namespace argo --create-namespace --wait --timeout 10m \
    --values k8s/workflows/argo-values.yaml --set server.enabled=false --set crds.full=false # full ones come from GitHub by a job
}

pipeline() {
  say "pipeline objects"
  # Webhooks answer a little later than their pods are ready, hence the tries.
  for try in 1 2 3 4 5 6; do
    kubectl kustomize k8s/overlays/kind | sed "s#moonlight-pipeline:e2e#${IMAGE}#" \
      | kubectl apply --server-side --force-conflicts --filename - && break
    [ "${try}" -lt 6 ] || give_up "the objects were refused six times: are the operators' pods and webhooks ready?"
    sleep 20
  done
  kubectl --namespace moonlight-storage rollout status deployment/s3 --timeout 5m
  kubectl wait clusterqueues --all --for condition=Active --timeout 5m
}

run() {
  say "run"
  forget e2e
  kubectl --namespace moonlight-storage exec --stdin deployment/s3 -- python - http://localhost:5000 moonlight < k8s/e2e/bucket.py
  kubectl create --filename k8s/e2e/workflow.yaml
  follow e2e
}

retrain() {
  say "run again, from the published model"
  forget e2e-retrain
  kubectl create --filename k8s/e2e/retrain.yaml
  follow e2e-retrain
  verify | tee /dev/stderr | grep "started from models/" > /dev/null
}

forget() { # what an earlier run of this script left in the cluster
  kubectl --namespace moonlight delete workflow "$1" --ignore-not-found
  kubectl --namespace moonlight delete rayjobs --selector "moonlight.ai/run-id=$1" --timeout 5m
}

follow() {
  local name=$1 phase="" waiting="" unpulled=0 deadline=$((SECONDS + TIMEOUT))
  while [ "${SECONDS}" -lt "${deadline}" ]; do
    phase=$(kubectl --namespace moonlight get workflow "${name}" --output jsonpath='{.status.phase}' || true)
    case "${phase}" in
      Succeeded) return 0 ;;
      Failed | Error)
        diagnose "${name}"
        give_up "workflow ${name}: ${phase}"
        ;;
    esac
    kubectl --namespace moonlight get rayjobs --selector "moonlight.ai/run-id=${name}" --no-headers 2>/dev/null || true
    waiting=$(kubectl --namespace moonlight get pods --output jsonpath='{.items[*].status.containerStatuses[*].state.waiting.reason}' || true)
    case "${waiting}" in *ImagePull*) unpulled=$((unpulled + 1)) ;; *) unpulled=0 ;; esac
    if [ "${unpulled}" -ge 15 ]; then # five minutes on end: no slow registry, a wrong name
      diagnose "${name}"
      give_up "the nodes cannot pull an image; is it IMAGE=${IMAGE}?"
    fi
    sleep 20
  done
  diagnose "${name}"
  give_up "workflow ${name}: ${phase:-no answer} after ${TIMEOUT} s"
}

verify() {
  say "published model"
  kubectl --namespace moonlight-storage exec --stdin deployment/s3 -- python - http://localhost:5000 moonlight e2e < k8s/e2e/verify.py
}

diagnose() { # everything that may say why; what cannot be had is left out
  local operator
  say "what went wrong with ${1:-e2e}"
  kubectl --namespace moonlight get workflows,rayjobs,workloads,pods --output wide || true
  kubectl --namespace moonlight describe rayjobs --selector "moonlight.ai/run-id=${1:-e2e}" | tail -60 || true
  kubectl --namespace moonlight describe workloads | tail -60 || true
  kubectl --namespace moonlight get events --sort-by .lastTimestamp | tail -40 || true
  say "drivers and Ray's nodes"
  kubectl --namespace moonlight logs --selector "workflows.argoproj.io/workflow=${1:-e2e}" --container main --tail 40 --prefix || true
  kubectl --namespace moonlight logs --selector ray.io/is-ray-node=yes --all-containers --tail 40 --prefix || true
  for operator in kuberay-system/kuberay-operator kueue-system/kueue-controller-manager argo/argo-workflows-workflow-controller; do
    say "${operator}"
    kubectl --namespace "${operator%/*}" logs "deployment/${operator#*/}" --tail 30 || true
  done
}

clean() {
  say "clean"
  kubectl --namespace moonlight delete workflows --all
  kubectl --namespace moonlight delete rayjobs --selector app.kubernetes.io/managed-by=moonlight-driver --timeout 5m
  kubectl kustomize k8s/overlays/kind | kubectl delete --ignore-not-found --filename -
}

teardown() {
  say "tear down"
  kind delete cluster --name moonlight
}

if [ "$#" -eq 0 ]; then
  set -- operators pipeline run verify
fi
for step in "$@"; do
  "${step}"
done
