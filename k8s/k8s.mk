# Included by the Makefile: targets around the image and the cluster.
IMAGE ?= moonlight-pipeline:e2e
IMAGE_BASE ?= rayproject/ray:2.60.0-py311-gpu
PIP_ARGS ?=
EXTRAS ?=
OPERATORS ?= prometheus fluent-bit karpenter gpu-operator efa-device-plugin kuberay kueue argo-workflows
VENV ?= .venv
OVERLAY ?= prod

boards: $(STAMP) ## Write the Grafana boards of k8s/monitoring anew
	$(VENV)/bin/python -m jobs.boards.board k8s/monitoring/dashboards

.PHONY: boards image k8s-check k8s-apply-check operators conformance e2e e2e-kind

image: ## Build the one image of all stages (EXTRAS="eval language ...": optional dependencies of pyproject.toml)
	docker build --tag $(IMAGE) --build-arg BASE=$(IMAGE_BASE) --build-arg PIP_ARGS="$(PIP_ARGS)" \
	  --build-arg EXTRAS="$(EXTRAS)" --build-arg GIT_COMMIT=$$(git rev-parse HEAD) .

# In an environment of its own: it pins what others pin otherwise. Where it cannot be had, its one test skips and says so.
CHECKOV := $(VENV)/checkov/bin/checkov
$(CHECKOV):
	-$(PYTHON) -m venv $(VENV)/checkov && $(VENV)/checkov/bin/pip install --quiet --disable-pip-version-check checkov==3.3.30

# Debian's, unpacked without being installed; where it cannot be had, the tests of alerts skip and say so.
PROMTOOL := $(VENV)/promtool/usr/bin/promtool
$(PROMTOOL):
	-{ command -v promtool && command -v amtool; } >/dev/null || { mkdir -p $(VENV)/promtool && cd $(VENV)/promtool && \
	  apt-get --quiet download prometheus prometheus-alertmanager && for deb in *.deb; do dpkg --extract $$deb . && rm $$deb; done; }

k8s-check: $(STAMP) $(CHECKOV) $(PROMTOOL) ## Everything about k8s/ and infra/ that can be checked without a cluster
	PATH="$(abspath $(VENV))/bin:$(abspath $(VENV))/checkov/bin:$(abspath $(VENV))/promtool/usr/bin:$$PATH" \
	  $(VENV)/bin/python -m pytest -m "long or not long" --override-ini addopts= -q -rs \
	  -n auto --maxprocesses 4 --dist worksteal tests/k8s tests/infra tests/workflow/test_rayjobs_template.py

operators: $(STAMP) ## Install the operators of k8s/gitops with helm, on the cluster of KUBECONFIG
	$(VENV)/bin/python k8s/gitops/helm.py $(OPERATORS)

# On a server that never saw them the namespaces must be there first: a dry run makes none.
k8s-apply-check: ## Would the cluster of KUBECONFIG, with its CRDs, webhooks and policies, take every object of OVERLAY (prod, dev)?
	kubectl apply --server-side --filename k8s/base/namespaces.yaml
	kubectl kustomize k8s/overlays/$(OVERLAY) | kubectl apply --server-side --force-conflicts --dry-run=server --filename -

conformance: $(STAMP) ## Versions, objects, alerts, policies by impersonation and runs in throw-away namespaces of the cluster of KUBECONFIG, in one table
	PYTHONPATH=. $(VENV)/bin/python -m k8s.conformance --overlay $(OVERLAY) $(CONFORMANCE_ARGS)

e2e: ## The debug pipeline on the cluster of KUBECONFIG (IMAGE must be pullable there)
	IMAGE=$(IMAGE) k8s/e2e/e2e.sh

e2e-kind: ## The same on a new kind cluster
	IMAGE=$(IMAGE) k8s/e2e/e2e.sh cluster image operators pipeline run verify
