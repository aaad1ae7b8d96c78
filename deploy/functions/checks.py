"""Checks of the AWS template that a schema cannot make: cfn-lint first, then ours.

    python -m deploy.functions.checks [TEMPLATE]

cfn-lint knows which properties exist and what they may hold. It does not know that a
queue must hide a message longer than its function may run, or that a function must not
write where its own uploads arrive. Each check here is of that kind, and says why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("template.yaml")
QUEUE, FUNCTION = "AWS::SQS::Queue", "AWS::Serverless::Function"
LAMBDA_FACTOR = 6  # of the timeout: what Lambda's documentation asks of a queue
LEAST_RECEIVES = 5  # fewer would call a throttled message a failed one
SNAPSHOT_PYTHON = (3, 12)  # the first that has SnapStart
SNAPSHOT_STORAGE_MB = 512


class TemplateError(ValueError):
    """Not a template that can be checked."""


@dataclass(frozen=True)
class Remark:
    """What one check found: where, and why it matters."""

    check: str
    place: str
    why: str

    def __str__(self) -> str:
        return f"{self.place}: expected that {self.check}, found not; {self.why}"


class Template:
    """A template as it is deployed with some parameters: conditions decided."""

    def __init__(self, body: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
        asked = body.get("Parameters", {})
        self.parameters = {name: asked[name].get("Default") for name in asked}
        self.parameters.update(chosen)
        self.conditions = body.get("Conditions", {})
        everyone = self.decide(body.get("Globals", {}).get("Function", {}))
        self.resources: dict[str, dict] = {
            name: self.decide(resource) for name, resource in body["Resources"].items()
        }
        for _, function in self.all_of(FUNCTION):
            for name, value in everyone.items():
                function.setdefault(name, value)

    def decide(self, node: Any) -> Any:
        """Parameters by their values, Fn::If by its branch; the rest as it is."""
        if isinstance(node, list):
            return [self.decide(item) for item in node]
        if not isinstance(node, dict):
            return node
        if node.get("Ref") in self.parameters:
            return self.parameters[node["Ref"]]
        if "Fn::If" in node:
            name, yes, no = node["Fn::If"]
            left, right = map(self.decide, self.conditions[name]["Fn::Equals"])
            return self.decide(yes if left == right else no)
        nothing = {"Ref": "AWS::NoValue"}
        decided = {name: self.decide(value) for name, value in node.items()}
        return {name: value for name, value in decided.items() if value != nothing}

    def all_of(self, kind: str) -> Iterator[tuple[str, dict]]:
        """Names and properties of the resources of one type."""
        for name, resource in self.resources.items():
            if resource["Type"] == kind:
                yield name, resource.setdefault("Properties", {})

    def queue(self, reference: Any) -> dict:
        """The properties of the queue that an `!GetAtt Queue.Arn` names."""
        name = reference["Fn::GetAtt"][0]
        return self.resources[name]["Properties"]

    def sources(self) -> Iterator[tuple[str, dict, dict]]:
        """Functions that read a queue: name, properties, those of the event source."""
        for name, function in self.all_of(FUNCTION):
            for event in function.get("Events", {}).values():
                if event["Type"] == "SQS":
                    yield name, function, event["Properties"]


Check = Callable[[Template], Iterator[str]]  # gives the places that fail
CHECKS: list[tuple[str, str, Check]] = []


def check(claim: str, why: str) -> Callable[[Check], Check]:
    """Enters a check: its claim follows "expected that"."""

    def enter(function: Check) -> Check:
        CHECKS.append((claim, why, function))
        return function

    return enter


@check(
    "a queue hides a message for 6 timeouts of its function and the batching window",
    "a message that reappears while it is worked on is worked on twice",
)
def visibility(template: Template) -> Iterator[str]:
    for name, function, source in template.sources():
        window = source.get("MaximumBatchingWindowInSeconds", 0)
        least = LAMBDA_FACTOR * function["Timeout"] + window
        if template.queue(source["Queue"]).get("VisibilityTimeout", 30) < least:
            yield name


@check(
    "a batch reports which of its messages failed",
    "otherwise one bad message makes all ten come again",
)
def partial_failures(template: Template) -> Iterator[str]:
    for name, _, source in template.sources():
        if "ReportBatchItemFailures" not in source.get("FunctionResponseTypes", []):
            yield name


@check(
    "a message is tried at least 5 times, then kept as a dead letter",
    "without an end a bad message is paid for until it is too old; too early an end "
    "loses messages that were only throttled",
)
def dead_letters(template: Template) -> Iterator[str]:
    for name, _, source in template.sources():
        redrive = template.queue(source["Queue"]).get("RedrivePolicy", {})
        if redrive.get("maxReceiveCount", 0) < LEAST_RECEIVES:
            yield name


@check(
    "dead letters are kept longer than the queue keeps its messages",
    "a message keeps its age when it moves: it would expire on arrival",
)
def retention(template: Template) -> Iterator[str]:
    four_days = 345_600  # what a queue has unless told otherwise
    for name, queue in template.all_of(QUEUE):
        if redrive := queue.get("RedrivePolicy"):
            letters = template.queue(redrive["deadLetterTargetArn"])
            kept = letters.get("MessageRetentionPeriod", four_days)
            if kept <= queue.get("MessageRetentionPeriod", four_days):
                yield name


@check(
    "snapshots are of a zip, on Python 3.12 or later, with 512 MB of /tmp at most",
    "Lambda offers SnapStart for nothing else: not for container images",
)
def snapshot_kind(template: Template) -> Iterator[str]:
    for name, function in template.all_of(FUNCTION):
        runtime = function.get("Runtime", "python0.0").removeprefix("python")
        storage = function.get("EphemeralStorage", {}).get("Size", 0)
        if has_snapshot(function) and (
            function.get("PackageType", "Zip") != "Zip"
            or tuple(map(int, runtime.split("."))) < SNAPSHOT_PYTHON
            or storage > SNAPSHOT_STORAGE_MB
            or "FileSystemConfigs" in function
        ):
            yield name


@check(
    "a function has a snapshot or is kept ready, not both",
    "Lambda refuses the second when the version is published",
)
def one_readiness(template: Template) -> Iterator[str]:
    for name, function in template.all_of(FUNCTION):
        if has_snapshot(function) and "ProvisionedConcurrencyConfig" in function:
            yield name


@check(
    "callers use an alias that moves to each new version",
    "snapshots and provisioned concurrency belong to versions, $LATEST has neither",
)
def alias(template: Template) -> Iterator[str]:
    for name, function in template.all_of(FUNCTION):
        if not function.get("AutoPublishAlias"):
            yield name


@check(
    "sandboxes are bounded, with room for those kept ready and those a queue may use",
    "unbounded, one function takes the account's whole concurrency, and its budget",
)
def bounded(template: Template) -> Iterator[str]:
    for name, function in template.all_of(FUNCTION):
        ready = function.get("ProvisionedConcurrencyConfig", {})
        needed = [1, ready.get("ProvisionedConcurrentExecutions", 0)]
        needed += [
            source.get("ScalingConfig", {}).get("MaximumConcurrency", 10**6)
            for reader, _, source in template.sources()
            if reader == name
        ]
        if function.get("ReservedConcurrentExecutions", 0) < max(needed):
            yield name


@check(
    "a call that nobody waits for goes somewhere when it fails for good",
    "Lambda tries it twice more and then forgets it",
)
def destination(template: Template) -> Iterator[str]:
    read = {name for name, _, _ in template.sources()}
    for name, function in template.all_of(FUNCTION):
        asynchronous = function.get("EventInvokeConfig", {})
        target = asynchronous.get("DestinationConfig", {}).get("OnFailure")
        if name not in read and not target:
            yield name


@check("logs end some day", "Lambda's own log groups are kept, and paid for, for ever")
def logs_end(template: Template) -> Iterator[str]:
    groups = dict(template.all_of("AWS::Logs::LogGroup"))
    for name, function in template.all_of(FUNCTION):
        group = function.get("LoggingConfig", {}).get("LogGroup", {}).get("Ref")
        if "RetentionInDays" not in groups.get(group, {}):
            yield name


@check(
    "a role may do what is named, to what is named",
    "a handler that is taken over may do all its role may",
)
def least_privilege(template: Template) -> Iterator[str]:
    for name, function in template.all_of(FUNCTION):
        if "Role" not in function:  # the transform would write one with Resource: "*"
            yield name
    for name, statement in statements(template):
        actions = as_list(statement["Action"])
        if "*" in as_list(statement["Resource"]) or any("*" in a for a in actions):
            yield name


@check(
    "a function writes nowhere that calls it",
    "each summary would be summarised, without end, at full price",
)
def no_circle(template: Template) -> Iterator[str]:
    buckets = [bucket for _, bucket in template.all_of("AWS::S3::Bucket")]
    watched = [prefix for bucket in buckets for prefix in watched_prefixes(bucket)]
    for name, statement in statements(template):
        if "s3:PutObject" in as_list(statement["Action"]):
            for target in as_list(statement["Resource"]):
                key = target["Fn::Sub"].partition("/")[2].rstrip("*")
                if any(key.startswith(p) or p.startswith(key) for p in watched):
                    yield name


@check(
    "only the account's own bucket may write to the queue",
    "s3.amazonaws.com alone admits everyone's buckets",
)
def own_bucket(template: Template) -> Iterator[str]:
    for name, policy in template.all_of("AWS::SQS::QueuePolicy"):
        for statement in policy["PolicyDocument"]["Statement"]:
            condition = statement.get("Condition", {})
            if "aws:SourceAccount" not in condition.get("StringEquals", {}):
                yield name


def has_snapshot(function: Mapping[str, Any]) -> bool:
    return function.get("SnapStart", {}).get("ApplyOn") == "PublishedVersions"


def watched_prefixes(bucket: Mapping[str, Any]) -> Iterator[str]:
    """The key prefixes whose objects a bucket tells of; "" for all."""
    for told in bucket.get("NotificationConfiguration", {}).get(
        "QueueConfigurations", []
    ):
        rules = told.get("Filter", {}).get("S3Key", {}).get("Rules", [])
        yield next((r["Value"] for r in rules if r["Name"] == "prefix"), "")


def statements(template: Template) -> Iterator[tuple[str, dict]]:
    """What roles may do: the role's name and each statement."""
    for name, role in template.all_of("AWS::IAM::Role"):
        for policy in role.get("Policies", []):
            for statement in policy["PolicyDocument"]["Statement"]:
                yield name, statement


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def read(path: Path = TEMPLATE) -> dict[str, Any]:
    """The template as plain data, !Ref and its kin written out.

    Raises TemplateError when it is no template.
    """
    from cfnlint.decode import decode

    body, problems = decode(str(path))
    if problems or not isinstance(body, dict) or "Resources" not in body:
        found = problems[0].message if problems else "no Resources"
        raise TemplateError(
            f"Expected a template in {path}, found: {found}. Correct it."
        )
    return body


def lint(path: Path = TEMPLATE) -> list[str]:
    """What cfn-lint says, down to its hints."""
    from cfnlint.api import ManualArgs, lint

    found = lint(path.read_text(), config=ManualArgs(include_checks=["I"]))
    return [f"{path}:{m.linenumber}: {m.rule.id} {m.message}" for m in found]


def audit(body: Mapping[str, Any], **parameters: Any) -> list[Remark]:
    """All that is wrong with a template, deployed with these parameters."""
    template = Template(body, parameters)
    return [
        Remark(claim, place, why)
        for claim, why, find in CHECKS
        for place in dict.fromkeys(find(template))
    ]


def readiness(body: Mapping[str, Any]) -> list[str]:
    """All that the template offers against cold starts."""
    return body["Parameters"]["Readiness"]["AllowedValues"]


def main(argv: list[str] | None = None) -> int:
    """Lints and audits every variant of a template; 1 where something was found."""
    (path,) = (argv if argv is not None else sys.argv[1:]) or [TEMPLATE]
    body = read(Path(path))
    said = lint(Path(path))
    remarks = {str(r) for way in readiness(body) for r in audit(body, Readiness=way)}
    said += sorted(remarks)
    print("\n".join(said) or f"{path}: cfn-lint and our {len(CHECKS)} checks: nothing")
    return min(1, len(said))


if __name__ == "__main__":
    sys.exit(main())
