"""A cluster that answers kubectl as the conformance kit asks it: operators, policies, a queue that holds one job, KubeRay's retries.

`broken` names what is wrong with it; every answer else is that of a cluster on which the guide is true.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from k8s.conformance.kubectl import Answer
from tests.k8s import rbac
from tests.k8s.manifests import Manifest, _rendered
from tests.k8s.rbac import Request, User
from tests.k8s.rules.policies import denials

TAGS = {"kuberay": "v1.7.0", "kueue": "v0.19.2", "argo": "v4.0.6"}


class Cluster:
    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.asked: list[str] = []
        self.stop_policy = "None"
        self.jobs: dict[str, str] = {}  # run -> stage, in the order of their creation
        self.evicted = False
        self.heads = 0
        self.copies: list[str] = []
        self.objects: list[Manifest] = []  # those of the newest copy, by which rights and policies are judged

    def __call__(self, arguments: Sequence[str], given: str | None = None) -> Answer:
        words = " ".join(arguments)
        self.asked.append(words)
        for start, answer in {
            "version": self._version,
            "get deployment": self._operator,
            "kustomize": lambda words, given: Answer(0, _rendered(words.split()[1])),
            "apply": self._apply,
            "get prometheusrules": lambda words, given: Answer(0, json.dumps({"spec": {"groups": [{"rules": [{"alert": "A"}, {"alert": "B"}, {"record": "r"}]}]}})),
            "get --raw": lambda words, given: Answer(0, json.dumps({"data": {"groups": [{"rules": [{"name": name} for name in ("A" if self.broken == "alerts" else "AB")]}]}})),
            "auth can-i": self._can_i,
            "create --dry-run": self._would_create,
            "create --filename": self._create,
            "patch clusterqueue": self._switch,
            "get rayjob ": self._state,
            "get pods": self._pods,
            "delete pods": self._lose_head,
            "delete rayjob ": self._delete,
            "delete rayjobs": lambda words, given: self._clear(),
            "get rayjobs": lambda words, given: Answer(0, "rayjob/x" if self.jobs else ""),
            "get workloadpriorityclasses": lambda words, given: Answer(0, "workloadpriorityclass.kueue.x-k8s.io/moonlight-release\n"),
            "delete namespaces": lambda words, given: Answer(0, ""),
            "delete validatingadmissionpolicybindings": self._forget,
            "get namespaces,": self._left,
        }.items():  # fmt: skip
            if words.startswith(start):
                return answer(words, given)
        raise AssertionError(words)

    def _version(self, words: str, given: str | None) -> Answer:
        minor = "33+" if self.broken == "old" else "34"
        return Answer(0, json.dumps({"serverVersion": {"major": "1", "minor": minor, "gitVersion": f"v1.{minor}.1"}}))

    def _operator(self, words: str, given: str | None) -> Answer:
        if self.broken == "no Kueue" and "kueue" in words:
            return Answer(1, "NotFound")
        tags = TAGS | ({"kuberay": "v1.6.2"} if self.broken == "other KubeRay" else {})
        return Answer(0, next(f"registry.example.com/x:{tag}" for name, tag in tags.items() if name in words))

    def _apply(self, words: str, given: str | None) -> Answer:
        if self.broken in ("objects", "no copy"):
            wrong = ("--dry-run" in words) == (self.broken == "objects")
            if wrong:
                return Answer(1, "denied")
        if "--dry-run" not in words:
            items = json.loads(given or "")["items"]
            self.copies.append(items[-1]["metadata"]["labels"]["moonlight.ai/conformance"])
            self.objects = items
        return Answer(0, "a\nb")

    def _asking(self, words: str) -> User:
        """By impersonation."""
        return User(*re.findall(r"--as (\S+)", words), tuple(re.findall(r"--as-group (\S+)", words)))

    def _can_i(self, words: str, given: str | None) -> Answer:
        verb, what, *options = words.split(" --as ")[0].split()[2:]
        resource, _, name = what.partition("/")
        resource, _, group = resource.partition(".")
        rest = dict(option.lstrip("-").split("=") for option in options)
        full = "/".join(part for part in (resource, rest.get("subresource")) if part)
        request = Request(verb, group, full, rest.get("namespace"), name)
        return Answer(0, "yes") if rbac.allowed(self.objects, self._asking(words), request) else Answer(1, "no")

    def _would_create(self, words: str, given: str | None) -> Answer:
        item, user = json.loads(given or ""), self._asking(words)
        group, namespace = item["apiVersion"].rpartition("/")[0], item["metadata"]["namespace"]
        if not rbac.allowed(self.objects, user, Request("create", group, item["kind"].lower() + "s", namespace)):
            return Answer(1, f"{user.name} cannot create {item['kind']}")
        said = denials(self.objects, item, user=user)
        return Answer(1, "; ".join(said)) if said else Answer(0, "created (dry run)")

    def _create(self, words: str, given: str | None) -> Answer:
        if self.broken == "no job":
            return Answer(1, "denied")
        labels = json.loads(given or "")["metadata"]["labels"]
        self.jobs[labels["moonlight.ai/run-id"]] = labels["moonlight.ai/stage"]
        return Answer(0, "")

    def _switch(self, words: str, given: str | None) -> Answer:
        self.stop_policy = json.loads(words.partition("--patch ")[2])["spec"]["stopPolicy"]
        self.evicted |= self.stop_policy == "HoldAndDrain"
        return Answer(0, "")

    def _runs(self, run: str) -> bool:
        if self.broken == "leak":
            return self.stop_policy == "None"
        if run not in self.jobs or (self.evicted and self.broken == "no resume"):
            return False
        if self.stop_policy != "None":
            return self.broken == ("no drain" if self.evicted else "no gate")
        return run == next(iter(self.jobs)) or self.broken == "no quota"

    def _pods(self, words: str, given: str | None) -> Answer:
        run = re.findall(r"run-id=([\w-]+)", words)[0]
        if "metadata.uid" in words:
            return Answer(0, f"uid-{self.heads}" if self._runs(run) else "")
        both = "Running Pending" if self.broken == "no gang" else "Running Running"
        return Answer(0, both if self._runs(run) else "")

    def _lose_head(self, words: str, given: str | None) -> Answer:
        self.heads += self.broken != "no head"
        return Answer(0, "")

    def _state(self, words: str, given: str | None) -> Answer:
        run = words.split()[2].rsplit("-", 2)[0]
        if self.jobs.get(run) != "publish":
            return Answer(0, "Running " if self._runs(run) else "Suspended ")
        if run.endswith("-c"):
            return Answer(0, "Failed 1" if self.broken == "no retry" else "Failed 2")
        return Answer(0, "Failed 1" if self.broken == "bad end" else "Complete ")

    def _delete(self, words: str, given: str | None) -> Answer:
        self.jobs.pop(words.split()[2].rsplit("-", 2)[0], None)
        return Answer(0, "")

    def _clear(self) -> Answer:
        self.jobs.clear()
        return Answer(0, "")

    def _forget(self, words: str, given: str | None) -> Answer:
        if self.broken != "stays":
            self.copies = [name for name in self.copies if f"conformance={name} " not in words]
        return Answer(0, "")

    def _left(self, words: str, given: str | None) -> Answer:
        return Answer(0, "\n".join(f"namespace/moonlight-{name}" for name in self.copies if f"={name} " in words))
