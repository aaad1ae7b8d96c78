"""The AWS template: cfn-lint, our own checks, and a mutation for each of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import serverless_deployment
from deploy.functions import checks
from local_cloud.containers import dockerfile


@pytest.fixture(scope="session")
def template() -> dict[str, Any]:
    return json.loads(json.dumps(checks.read()))


def test_cfn_lint_has_no_remark_not_even_a_hint():
    assert checks.lint() == []


def test_cfn_lint_does_look(tmp_path: Path):
    wrong = tmp_path / "template.yaml"
    text = checks.TEMPLATE.read_text()
    wrong.write_text(text.replace("RetentionInDays", "RetentionDays"))
    assert "'RetentionDays' was unexpected" in " ".join(checks.lint(wrong))


@pytest.mark.parametrize("way", ["none", "snapshot", "provisioned", "pinged"])
def test_our_own_checks_find_nothing_whatever_is_chosen(template: dict, way: str):
    assert way in checks.readiness(template)
    assert checks.audit(template, Readiness=way) == []


def test_what_is_chosen_is_what_is_deployed(template: dict):
    def answer(way: str) -> dict:
        chosen = checks.Template(template, {"Readiness": way})
        return dict(chosen.all_of(checks.FUNCTION))["Answer"]

    assert checks.has_snapshot(answer("snapshot"))
    ready = answer("provisioned")
    assert not checks.has_snapshot(ready)
    two = {"ProvisionedConcurrentExecutions": 2}
    assert ready["ProvisionedConcurrencyConfig"] == two
    pings = {
        way: answer(way)["Events"]["Ping"]["Properties"] for way in ("none", "pinged")
    }
    assert {way: pings[way]["State"] for way in pings} == {
        "none": "DISABLED",
        "pinged": "ENABLED",
    }


def test_the_handlers_that_the_template_names_exist(template: dict):
    for _, function in checks.Template(template, {}).all_of(checks.FUNCTION):
        module, _, name = function["Handler"].rpartition(".")
        assert module == "serverless_deployment"
        assert callable(getattr(serverless_deployment, name))


def test_what_is_measured_as_tuned_is_what_is_deployed(template: dict):
    """On Lambda, as a zip and as an image, with the lesson's own variables."""
    deployed = template["Globals"]["Function"]["Environment"]["Variables"]
    assert serverless_deployment.ENVIRONMENT.items() <= deployed.items()
    image = dockerfile.read(checks.TEMPLATE.with_name("Dockerfile"))
    words = " ".join(env.rest for env in image.inside("lambda", "ENV")).split()
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    assert serverless_deployment.ENVIRONMENT.items() <= variables.items()


def test_a_new_account_can_do_without_a_reservation(template: dict):
    for reserved, expected in ((0, {None}), (7, {7})):
        chosen = checks.Template(template, {"Reserved": reserved})
        found = {
            function.get("ReservedConcurrentExecutions")
            for _, function in chosen.all_of(checks.FUNCTION)
        }
        assert found == expected


GONE = object()
QUEUE = "Resources/Uploads/Properties"
SOURCE = "Resources/Summarise/Properties/Events/Uploads/Properties"
EVERYONE = "Globals/Function"
ROLE = "Resources/SummariseRole/Properties/Policies/0/PolicyDocument/Statement"


@pytest.mark.parametrize(
    ("path", "value", "check", "place"),
    [
        (f"{QUEUE}/VisibilityTimeout", 364, "6 timeouts", "Summarise"),
        (f"{QUEUE}/VisibilityTimeout", GONE, "6 timeouts", "Summarise"),
        ("Resources/Summarise/Properties/Timeout", 61, "6 timeouts", "Summarise"),
        (f"{SOURCE}/MaximumBatchingWindowInSeconds", 6, "6 timeouts", "Summarise"),
        (f"{SOURCE}/FunctionResponseTypes", GONE, "which of its", "Summarise"),
        (f"{QUEUE}/RedrivePolicy/maxReceiveCount", 4, "at least 5", "Summarise"),
        (f"{QUEUE}/RedrivePolicy", GONE, "at least 5", "Summarise"),
        (f"{QUEUE}/MessageRetentionPeriod", 1_209_600, "kept longer", "Uploads"),
        ("Resources/DeadLetters/Properties/MessageRetentionPeriod", GONE,
         "kept longer", "Uploads"),
        (f"{EVERYONE}/PackageType", "Image", "snapshots are of a zip", "Answer"),
        (f"{EVERYONE}/Runtime", "python3.11", "snapshots are of a zip", "Answer"),
        (f"{EVERYONE}/EphemeralStorage", {"Size": 513}, "of a zip", "Answer"),
        ("Resources/Answer/Properties/ProvisionedConcurrencyConfig",
         {"ProvisionedConcurrentExecutions": 1}, "not both", "Answer"),
        (f"{EVERYONE}/AutoPublishAlias", GONE, "an alias", "Answer"),
        (f"{EVERYONE}/ReservedConcurrentExecutions", GONE, "bounded", "Answer"),
        (f"{EVERYONE}/ReservedConcurrentExecutions", 4, "bounded", "Summarise"),
        (f"{SOURCE}/ScalingConfig", GONE, "bounded", "Summarise"),
        ("Resources/Answer/Properties/EventInvokeConfig", GONE, "nobody", "Answer"),
        ("Resources/AnswerLog/Properties/RetentionInDays", GONE, "logs", "Answer"),
        ("Resources/Answer/Properties/LoggingConfig", GONE, "logs end", "Answer"),
        (f"{ROLE}/1/Resource", "*", "what is named", "SummariseRole"),
        (f"{ROLE}/1/Action", "sqs:*", "what is named", "SummariseRole"),
        ("Resources/Answer/Properties/Role", GONE, "what is named", "Answer"),
        (f"{ROLE}/3/Resource/Fn::Sub", "arn:x/uploads/done/*", "calls it",
         "SummariseRole"),
        ("Resources/Documents/Properties/NotificationConfiguration"
         "/QueueConfigurations/0/Filter", GONE, "calls it", "SummariseRole"),
        ("Resources/UploadsPolicy/Properties/PolicyDocument/Statement/0/Condition",
         GONE, "own bucket", "UploadsPolicy"),
    ],
)  # fmt: skip
def test_each_check_finds_what_it_is_for(
    template: dict, path: str, value: Any, check: str, place: str
):
    remarks = checks.audit(changed(template, path, value))
    found = [r for r in remarks if check in r.check and r.place == place]
    assert found, [str(r) for r in remarks]
    assert {r.check for r in remarks} == {found[0].check}  # and nothing else


def changed(template: dict, path: str, value: Any) -> dict:
    """A copy of the template with one place changed, or removed."""
    whole = node = copy.deepcopy(template)
    *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    for key in way:
        node = node[key]
    if value is GONE:
        del node[last]
    else:
        node[last] = value
    return whole


def test_what_is_no_template_is_refused(tmp_path: Path):
    for text in ("Outputs: {}", "[1", ""):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(checks.TemplateError, match="Expected a template in"):
            checks.read(tmp_path / "x.yaml")
