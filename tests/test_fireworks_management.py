"""The account side of the Fireworks stand-in, through the real SDK in strict mode.

Time is virtual: an hour passes by `cloud.clock.advance(3600)`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fireworks import APIStatusError, AsyncFireworks, Fireworks

import models
from local_cloud.fireworks.app import Served, serve
from local_cloud.fireworks.catalogue import SMOLLM2
from local_cloud.fireworks.clock import Clock
from local_cloud.fireworks.deployments import Boot
from local_cloud.fireworks.plane import Route, Use
from local_cloud.fireworks.wire import extras

START_S = 1_800_000_000.0
BOOT = Boot()
DEPLOYED = "accounts/course/deployments/triage"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"\0" * 64,
}


@pytest.fixture
def cloud() -> Iterator[Served]:
    """An account without inference, at a standstill in time."""
    with serve(clock=Clock.manual(START_S)) as served:
        yield served


@pytest.fixture
def client(cloud: Served) -> Iterator[Fireworks]:
    with connect(cloud, Fireworks) as made:
        yield made


def connect(cloud: Served, kind: Any, **options: Any) -> Any:
    """A client that accepts nothing its types do not foresee, and never retries."""
    options = {"api_key": cloud.api_key, "account_id": cloud.account_id, **options}
    return kind(
        base_url=cloud.url, max_retries=0, _strict_response_validation=True, **options
    )


async def got(answer: Any) -> Any:
    """An answer of either client; it has no field that the SDK does not know."""
    result = await answer if inspect.isawaitable(answer) else answer
    assert extras(result) == []
    return result


def refused(call: Any, status: int, code: int, words: str = "") -> None:
    """The call is refused as the service does it: {code, message, details}."""
    with pytest.raises(APIStatusError) as caught:
        call()
    body = caught.value.body
    assert caught.value.status_code == status
    assert isinstance(body, dict)
    assert set(body) == {"code", "message", "details"}
    assert body["code"] == code
    assert words in body["message"]


def deploy(client: Fireworks, **options: Any) -> Any:
    given = {"base_model": SMOLLM2, "deployment_id": "triage", **options}
    return client.deployments.create(**given)


def route(cloud: Served, name: str = DEPLOYED) -> Route | None:
    return cloud.state.route(name, cloud.account_id)


def serving(cloud: Served) -> bool:
    found = route(cloud)
    return found is not None and found.serves


def use(cloud: Served, **took: Any) -> None:
    """Let the deployment have answered one request, now."""
    measured = {"first_token_s": 0.1, "total_s": 1.0, **took}
    found = route(cloud)
    assert found is not None
    cloud.state.began(found)
    cloud.state.ended(found, Use(100, 40, 10, **measured))


# The whole flow, with both clients.


async def flow(client: Any, cloud: Served) -> None:
    """Account, keys, catalogue, upload, deployment, scaling, sleep, wake, delete."""
    assert (await got(client.accounts.list())).accounts[0].name == "accounts/course"
    assert (await got(client.accounts.get())).state == "READY"
    key = await got(client.api_keys.create("learner", api_key={"display_name": "ci"}))
    listed = (await got(client.api_keys.list("learner"))).api_keys
    assert [k.display_name for k in listed] == ["default", "ci"]
    assert all(k.key is None for k in listed)
    await got(client.api_keys.delete("learner", key_id=key.key_id))

    catalogue = (await got(client.models.list(account_id="fireworks"))).models
    assert SMOLLM2 in {m.name for m in catalogue if m.supports_serverless}
    await upload(client)
    assert (await got(client.models.get("triage"))).state == "READY"
    shapes = await got(
        client.deployment_shape_versions.match_for_model(
            "accounts/course/models/triage"
        )
    )

    made = await got(
        client.deployments.create(
            base_model="accounts/course/models/triage",
            deployment_id="triage",
            deployment_shape=shapes.deployment_shape_versions[0].snapshot.name,
            max_replica_count=2,
            autoscaling_policy={"scale_to_zero_window": "300s"},
            placement={"multi_region": "EUROPE"},
        )
    )
    assert (made.state, made.precision, made.region) == (
        "CREATING",
        "FP8",
        "EU_FRANKFURT_1",
    )
    cloud.clock.advance(BOOT.ready_s + BOOT.route_s)
    assert (await got(client.deployments.get("triage"))).state == "READY"
    await got(client.deployments.scale("triage", replica_count=2))
    assert (await got(client.deployments.get("triage"))).desired_replica_count == 2
    assert serving(cloud)
    cloud.clock.advance(300)
    assert (await got(client.deployments.get("triage"))).replica_count == 0
    assert not serving(cloud)
    cloud.clock.advance(BOOT.ready_s + BOOT.route_s)
    assert serving(cloud)
    use(cloud)
    metrics = await got(
        client.get("/v1/accounts/course/metrics", cast_to=httpx.Response)
    )
    assert "request_counter_total:sum_by_deployment{" in metrics.text
    await got(client.deployments.delete("triage", ignore_checks=True))
    assert (await got(client.deployments.list())).deployments == []


async def upload(client: Any) -> None:
    """A model of one's own: create, put every file, validate."""
    details = {"parameter_count": "134515008", "world_size": 1}
    fields = {"kind": "HF_BASE_MODEL", "base_model_details": details}
    await got(client.models.create(model_id="triage", model=fields))
    sizes = {name: str(len(content)) for name, content in FILES.items()}
    asked = client.models.get_upload_endpoint("triage", filename_to_size=sizes)
    urls = (await got(asked)).filename_to_signed_urls
    async with httpx.AsyncClient() as plain:  # without the API key
        for name, url in urls.items():
            assert (await plain.put(url, content=FILES[name])).status_code == 200
    checked = await got(client.models.validate_upload("triage"))
    assert "Emulated" in checked.warnings[0]


def test_the_whole_flow_through_the_sync_client(cloud: Served, client: Fireworks):
    asyncio.run(flow(client, cloud))


def test_the_whole_flow_through_the_async_client(cloud: Served):
    async def work() -> None:
        async with connect(cloud, AsyncFireworks) as client:
            await flow(client, cloud)

    asyncio.run(asyncio.wait_for(work(), 30))


# Keys and names.


@pytest.mark.parametrize("key", ["fw_3abcdefREALLYREAL", "fw_fake_unknown", "x"])
def test_a_wrong_key_opens_nothing(cloud: Served, key: str):
    with connect(cloud, Fireworks, api_key=key) as client:
        refused(client.accounts.get, 401, 16, "invalid")
        refused(client.deployments.list, 401, 16)


def test_a_stand_in_is_never_built_around_a_real_key():
    with pytest.raises(ValueError, match="fw_fake_"), serve(api_key="fw_real"):
        pass


def test_a_key_works_until_it_is_deleted_or_expires(cloud: Served, client: Fireworks):
    ends = "2027-01-15T09:00:00Z"  # an hour from the start
    made = client.api_keys.create("learner", api_key={"expire_time": ends})
    assert made.key
    assert cloud.state.account(made.key) == "course"
    cloud.clock.advance(3601)
    assert cloud.state.account(made.key) is None
    other = client.api_keys.create("learner", api_key={"display_name": "ci"})
    assert other.key
    assert other.key_id
    client.api_keys.delete("learner", key_id=other.key_id)
    assert cloud.state.account(other.key) is None


def test_another_account_is_closed_and_a_public_one_is_read_only(client: Fireworks):
    refused(lambda: client.models.list(account_id="somebody"), 403, 7)
    assert client.models.get("smollm2-135m-instruct", account_id="fireworks").public
    refused(lambda: client.deployments.list(account_id="fireworks"), 403, 7)
    refused(
        lambda: client.models.delete("smollm2-135m-instruct", account_id="fireworks"),
        403,
        7,
    )


def test_a_whole_name_in_place_of_an_id_is_not_found(client: Fireworks):
    made = deploy(client)
    assert made.name
    assert client.deployments.get("triage").name == made.name
    refused(lambda: client.deployments.get(made.name), 404, 5, "last part")


def test_users_can_be_made_and_changed(client: Fireworks):
    client.users.create(role="user", user_id="ada", email="ada@example.com")
    changed = client.users.update(
        "ada",
        role="admin",
        display_name="Ada",
        extra_query={"updateMask": "role,display_name"},
    )
    assert (changed.role, changed.email) == ("admin", "ada@example.com")
    assert {u.name for u in client.users.list()} >= {"accounts/course/users/ada"}


def test_lists_come_in_pages(client: Fireworks):
    page = client.models.list(account_id="fireworks", page_size=1)
    assert len(page.models) == 1
    assert page.next_page_token
    assert len(list(page)) == 2  # the SDK follows the token
    refused(lambda: client.models.list(account_id="fireworks", page_token="?"), 400, 3)
    refused(lambda: client.models.list(filter="x"), 501, 12, "filter")


# Uploads.


def test_an_upload_that_was_cut_off_does_not_become_a_model(client: Fireworks):
    fields: Any = {"kind": "HF_BASE_MODEL", "base_model_details": {"world_size": 1}}
    client.models.create(model_id="triage", model=fields)
    sizes = {name: str(len(content)) for name, content in FILES.items()}
    asked = client.models.get_upload_endpoint("triage", filename_to_size=sizes)
    urls = asked.filename_to_signed_urls or {}
    assert httpx.put(urls["config.json"], content=b"{").status_code == 400
    refused(lambda: client.models.validate_upload("triage"), 400, 9, "config.json")
    refused(
        lambda: client.deployments.create(base_model="accounts/course/models/triage"),
        400,
        9,
        "validateUpload",
    )


def test_a_signed_url_ends_after_an_hour(cloud: Served, client: Fireworks):
    client.datasets.create(dataset_id="rows", dataset={})
    asked = client.datasets.get_upload_endpoint("rows", filename_to_size={"a": "1"})
    cloud.clock.advance(3601)
    url = (asked.filename_to_signed_urls or {})["a"]
    assert httpx.put(url, content=b"1").status_code == 404


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", ""])
def test_a_file_name_cannot_leave_its_folder(client: Fireworks, name: str):
    client.datasets.create(dataset_id="rows", dataset={})
    refused(
        lambda: client.datasets.get_upload_endpoint(
            "rows", filename_to_size={name: "1"}
        ),
        400,
        3,
        "plain file name",
    )


def test_a_dataset_comes_back_as_it_was_sent(client: Fireworks):
    rows = b'{"messages": []}\n{"messages": []}\n'
    client.datasets.create(dataset_id="rows", dataset={"display_name": "Rows"})
    sent = client.datasets.upload("rows", file=("rows.jsonl", rows))
    assert (sent.bytes, sent.filename) == (len(rows), "rows.jsonl")
    kept = client.datasets.get("rows")
    assert (kept.state, kept.example_count) == ("READY", "2")
    urls = client.datasets.get_download_endpoint("rows").filename_to_signed_urls or {}
    assert httpx.get(urls["rows.jsonl"]).content == rows


def test_a_dataset_that_is_not_json_lines_is_refused(client: Fireworks):
    client.datasets.create(dataset_id="rows", dataset={})
    call = lambda: client.datasets.upload("rows", file=("r.jsonl", b"{}\nno\n"))  # noqa: E731
    refused(call, 400, 3, "line 2")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("models", b"[]"),
        ("models", b"{"),
        ("models", b'{"modelId": "a", "model": 3}'),
        ("users/learner/apiKeys:delete", b'{"keyId": {}}'),
        ("deploymentShapeVersions:match", b'{"createDeploymentRequest": 1}'),
        ("deployments", b"null"),
        ("datasets/rows:upload", b"no form"),
    ],
)
def test_a_body_of_the_wrong_form_is_refused(cloud: Served, path: str, content: bytes):
    with connect(cloud, Fireworks) as client:
        client.datasets.create(dataset_id="rows", dataset={})
    answer = httpx.post(
        f"{cloud.url}/v1/accounts/course/{path}",
        content=content,
        headers={"authorization": f"Bearer {cloud.api_key}"},
    )
    assert answer.status_code in (400, 404)
    assert set(answer.json()) == {"code", "message", "details"}


# Deployments.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"autoscaling_policy": {"scale_to_zero_window": "299s"}}, "at least 300s"),
        ({"autoscaling_policy": {"scale_up_window": "3601s"}}, "at most 3600s"),
        ({"autoscaling_policy": {"scale_down_window": "10m"}}, '"300s"'),
        ({"autoscaling_policy": {"load_targets": {"cpu": 1}}}, "loadTargets"),
        ({"min_replica_count": 3, "max_replica_count": 1}, "minReplicaCount"),
        ({"precision": "NF4"}, "precision"),
        ({"accelerator_type": "NVIDIA_L4_24GB"}, "acceleratorType"),
        ({"deployment_id": "Not An Id"}, "deploymentId"),
        ({"placement": {"multi_region": "US", "region": "US_IOWA_1"}}, "placement"),
        ({"deployment_shape": "default", "precision": "BF16"}, "shape"),
        ({"extra_body": {"replicas": 1}}, "unknown ['replicas']"),
        ({"extra_body": {"minReplicaCount": "many"}}, "minReplicaCount"),
        ({"extra_query": {"dryRun": "true"}}, "dryRun"),
    ],
)
def test_a_deployment_that_cannot_be_is_refused_with_a_reason(
    client: Fireworks, options: dict[str, Any], words: str
):
    refused(lambda: deploy(client, **options), 400, 3, words)
    assert client.deployments.list().deployments == []


def test_validate_only_makes_nothing(cloud: Served, client: Fireworks):
    assert deploy(client, validate_only=True).precision == "BF16"
    assert client.deployments.list().deployments == []
    assert cloud.state.bill().total_usd == 0


def test_defaults_are_those_of_the_service(client: Fireworks):
    made = deploy(client)
    policy = made.autoscaling_policy
    assert (made.min_replica_count, made.max_replica_count) == (0, 1)
    assert (policy.scale_up_window, policy.scale_down_window) == ("30s", "600s")
    assert policy.scale_to_zero_window == "3600s"
    assert "emulated" in made.status.message
    refused(lambda: deploy(client), 409, 6)


def test_a_deployment_is_ready_before_it_serves(cloud: Served, client: Fireworks):
    deploy(client)
    assert route(cloud) == Route(SMOLLM2, DEPLOYED, serves=False)
    cloud.clock.advance(BOOT.schedule_s)
    stats = client.deployments.get("triage").replica_stats
    assert stats
    assert stats.downloading_model_replica_count == 1
    cloud.clock.advance(BOOT.ready_s - BOOT.schedule_s)
    assert client.deployments.get("triage").state == "READY"
    assert not serving(cloud)
    cloud.clock.advance(BOOT.route_s)
    assert serving(cloud)


def test_names_lead_to_a_deployment_in_every_form(cloud: Served, client: Fireworks):
    base = f"{SMOLLM2}-on-demand"
    assert route(cloud, base) is None  # not serverless, and nowhere deployed
    deploy(client, base_model=base)
    for name in (base, DEPLOYED, f"{base}#{DEPLOYED}"):
        found = route(cloud, name)
        assert found
        assert (found.model, found.deployment) == (base, DEPLOYED)
    assert route(cloud, SMOLLM2) == Route(SMOLLM2)
    assert route(cloud, f"{SMOLLM2}#{DEPLOYED}") is None
    refs = client.models.get("smollm2-135m-instruct-on-demand", account_id="fireworks")
    assert refs.deployed_model_refs
    assert refs.deployed_model_refs[0].deployment == DEPLOYED


def test_an_update_without_a_mask_replaces_everything(client: Fireworks):
    deploy(client, display_name="Triage", min_replica_count=1, max_replica_count=3)
    changed = client.deployments.update("triage", base_model=SMOLLM2, description="new")
    assert (changed.display_name, changed.max_replica_count) == (None, 1)


def test_an_update_with_a_mask_changes_what_it_names(client: Fireworks):
    policy: Any = {"scale_to_zero_window": "300s", "scale_up_window": "60s"}
    deploy(client, display_name="Triage", autoscaling_policy=policy)
    changed = client.deployments.update(
        "triage",
        base_model=SMOLLM2,
        max_replica_count=3,
        autoscaling_policy={"scale_to_zero_window": "900s"},
        extra_query={
            "updateMask": "maxReplicaCount,autoscaling_policy.scale_to_zero_window"
        },
    )
    assert (changed.display_name, changed.max_replica_count) == ("Triage", 3)
    assert changed.autoscaling_policy
    assert changed.autoscaling_policy.scale_to_zero_window == "900s"
    assert changed.autoscaling_policy.scale_up_window == "60s"
    refused(
        lambda: client.deployments.update(
            "triage", base_model=SMOLLM2, extra_query={"updateMask": "state"}
        ),
        400,
        3,
        "updateMask",
    )


def test_a_masked_update_can_change_the_shape(client: Fireworks):
    assert deploy(client, deployment_shape="default").precision == "FP8"
    name = "accounts/fireworks/deploymentShapes/full-precision"
    changed = client.deployments.update(
        "triage",
        base_model=SMOLLM2,
        deployment_shape=name,
        extra_query={"updateMask": "deployment_shape"},
    )
    assert (changed.precision, changed.deployment_shape) == (
        "BF16",
        f"{name}/versions/v1",
    )


def test_scaling_stays_within_bounds(client: Fireworks):
    deploy(client, max_replica_count=2)
    client.deployments.scale("triage", replica_count=2)
    refused(
        lambda: client.deployments.scale("triage", replica_count=3), 400, 3, "0 to 2"
    )
    client.deployments.scale("triage", replica_count=0)
    assert client.deployments.get("triage").desired_replica_count == 0


def test_load_adds_replicas_and_its_end_takes_them_away(
    cloud: Served, client: Fireworks
):
    policy: Any = {
        "load_targets": {"requests_per_second": 0.1},
        "scale_up_window": "30s",
        "scale_down_window": "120s",
    }
    deploy(client, min_replica_count=1, max_replica_count=4, autoscaling_policy=policy)
    cloud.clock.advance(100)
    for _ in range(60):  # one request a second: ten times what a replica shall take
        use(cloud)
        cloud.clock.advance(1)
    assert client.deployments.get("triage").desired_replica_count == 4
    cloud.clock.advance(90)
    assert client.deployments.get("triage").desired_replica_count == 4
    cloud.clock.advance(90)
    assert client.deployments.get("triage").desired_replica_count == 1


def test_a_deployment_that_always_has_a_replica_never_sleeps(
    cloud: Served, client: Fireworks
):
    deploy(client, min_replica_count=1)
    cloud.clock.advance(30 * 86_400)
    assert client.deployments.get("triage").replica_count == 1
    assert serving(cloud)


def test_replicas_are_billed_while_they_are_up(cloud: Served, client: Fireworks):
    policy: Any = {"scale_to_zero_window": "300s"}
    deploy(client, autoscaling_policy=policy, accelerator_type="NVIDIA_H100_80GB")
    cloud.clock.advance(BOOT.ready_s)
    assert cloud.state.bill().gpu_seconds == 0  # booting is free
    cloud.clock.advance(86_400)
    bill = cloud.state.bill()
    hour_usd = cloud.state.prices.gpu_hour["NVIDIA_H100_80GB"]
    assert bill.gpu_seconds == 300
    assert bill.total_usd == pytest.approx(hour_usd / 12)
    client.deployments.delete("triage", hard=True)
    assert cloud.state.bill() == bill  # gone, but not for free


def test_a_serverless_call_is_billed_by_its_tokens(cloud: Served):
    cloud.state.ended(Route(SMOLLM2), Use(1_000_000, 0, 0, 0.1, 1.0))
    assert cloud.state.bill().serverless_usd == cloud.state.prices.token.input


def test_a_deployment_does_not_sleep_while_it_answers(cloud: Served, client: Fireworks):
    deploy(client, autoscaling_policy={"scale_to_zero_window": "300s"})
    cloud.clock.advance(100)
    found = route(cloud)
    assert found
    cloud.state.began(found)
    cloud.clock.advance(3600)
    assert client.deployments.get("triage").replica_count == 1
    cloud.state.ended(found, Use(1, 0, 1, 0.1, 1.0))
    cloud.clock.advance(300)
    assert client.deployments.get("triage").replica_count == 0


def test_what_served_within_the_hour_is_not_deleted_by_accident(
    cloud: Served, client: Fireworks
):
    deploy(client, min_replica_count=1)
    cloud.clock.advance(100)
    use(cloud)
    refused(lambda: client.deployments.delete("triage"), 400, 9, "ignoreChecks")
    cloud.clock.advance(3600)
    client.deployments.delete("triage")
    assert not client.deployments.list().deployments
    gone = client.deployments.list(show_deleted=True).deployments[0]
    assert (gone.state, gone.replica_count) == ("DELETED", 0)
    assert route(cloud) is None


def test_a_deleted_deployment_comes_back_until_it_is_purged(
    cloud: Served, client: Fireworks
):
    deploy(client)
    client.deployments.delete("triage")
    refused(lambda: deploy(client), 409, 6)
    assert client.deployments.undelete("triage", body={}).state != "DELETED"
    client.deployments.delete("triage")
    cloud.clock.advance(8 * 86_400)
    refused(lambda: client.deployments.get("triage"), 404, 5)
    deploy(client)


# Metrics.


def read_metrics(client: Fireworks) -> dict[str, float]:
    """Metric, with its `le` or `http_code` if it has one, to value."""
    response = client.get("/v1/accounts/course/metrics", cast_to=httpx.Response)
    values = {}
    for line in response.text.splitlines():
        if not line.startswith("#"):
            name, _, rest = line.partition("{")
            labels, _, value = rest.rpartition("} ")
            own = [
                p for p in labels.split(",") if p.split("=")[0] in ("le", "http_code")
            ]
            values[name + "".join(own)] = float(value)
    return values


def test_metrics_are_rates_of_the_last_minute(cloud: Served, client: Fireworks):
    deploy(client, min_replica_count=1)
    cloud.clock.advance(100)
    for _ in range(30):
        use(cloud, total_s=0.4)
    cloud.state.refused(route(cloud), 503)
    values = read_metrics(client)
    assert values["request_counter_total:sum_by_deployment"] == pytest.approx(31 / 60)
    assert values["tokens_prompt_total:sum_by_deployment"] == pytest.approx(50)
    assert values["tokens_cached_prompt_total:sum_by_deployment"] == pytest.approx(20)
    failed = 'requests_error_total:sum_by_deploymenthttp_code="503"'
    assert values[failed] == pytest.approx(1 / 60)
    bucket = "latency_overall_ms_bucket:sum_by_deployment"
    assert values[f'{bucket}le="250"'] == 0
    assert values[f'{bucket}le="500"'] == values[f'{bucket}le="+Inf"'] == 0.5
    cloud.clock.advance(60)
    # A counter would have kept its value.
    assert read_metrics(client)["request_counter_total:sum_by_deployment"] == 0


def test_metrics_can_be_read_six_times_a_minute(cloud: Served, client: Fireworks):
    for _ in range(6):
        read_metrics(client)
    refused(lambda: read_metrics(client), 429, 8)
    cloud.clock.advance(60)
    read_metrics(client)


# Batch jobs, on the real model.

ROWS = [
    {"custom_id": "sky", "body": {"messages": [{"role": "user", "content": "Hello"}]}},
    {"custom_id": "sea", "body": {"messages": [{"role": "user", "content": "Hi"}]}},
    {"custom_id": "bad", "body": {"messages": "not a list"}},
]


def run_job(client: Fireworks, rows: list[dict[str, Any]]) -> Any:
    content = "\n".join(map(json.dumps, rows)).encode()
    client.datasets.create(dataset_id="in", dataset={})
    client.datasets.upload("in", file=("in.jsonl", content))
    client.batch_inference_jobs.create(
        batch_inference_job_id="job",
        input_dataset_id="accounts/course/datasets/in",
        output_dataset_id="out",
        model=SMOLLM2,
        inference_parameters={"max_tokens": 8, "temperature": 0},
    )
    for _ in range(3000):
        job = client.batch_inference_jobs.get("job")
        if job.state in ("JOB_STATE_COMPLETED", "JOB_STATE_FAILED"):
            return job
    pytest.fail(f"the job never ended: {job}")


def test_a_batch_job_really_answers_at_half_price(model: models.Model):
    with serve(model, clock=Clock.manual(START_S)) as cloud:
        with connect(cloud, Fireworks) as client:
            job = run_job(client, ROWS)
            assert job.state == "JOB_STATE_COMPLETED"
            assert extras(job) == []
            assert job.job_progress.percent == 100
            assert job.job_progress.failed_requests == 1
            asked = client.datasets.get_download_endpoint("out")
            urls = asked.filename_to_signed_urls or {}
            results = httpx.get(urls["results.jsonl"]).text.splitlines()
            errors = httpx.get(urls["errors.jsonl"]).text.splitlines()
            source = client.datasets.get("out").source_job_name
        told = {row["custom_id"]: row["response"] for row in map(json.loads, results)}
        bill = cloud.state.bill()
    assert set(told) == {"sky", "sea"}
    assert told["sky"]["choices"][0]["message"]["content"]
    assert json.loads(errors[0])["custom_id"] == "bad"
    assert source == job.name
    used = [t["usage"] for t in told.values()]
    tokens = sum(u["prompt_tokens"] + u["completion_tokens"] for u in used)
    whole = cloud.state.prices.call_usd(tokens, 0, 0)
    assert bill.serverless_usd == 0
    assert bill.batch_usd == pytest.approx(whole / 2)


@pytest.mark.parametrize(
    "rows", [[{"custom_id": "a"}], [ROWS[0], ROWS[0]], [{"custom_id": 1, "body": {}}]]
)
def test_a_batch_of_malformed_lines_fails_with_a_reason(
    model: models.Model, rows: list[dict[str, Any]]
):
    clock = Clock.manual(START_S)
    with serve(model, clock=clock) as cloud, connect(cloud, Fireworks) as client:
        job = run_job(client, rows)
    assert job.state == "JOB_STATE_FAILED"
    assert "custom_id" in job.status.message


def test_a_server_that_ends_leaves_no_job_and_no_file_behind(model: models.Model):
    long = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 900}
    with serve(model) as cloud:
        with connect(cloud, Fireworks) as client:
            client.datasets.create(dataset_id="in", dataset={})
            row = json.dumps({"custom_id": "a", "body": long}).encode()
            client.datasets.upload("in", file=("in.jsonl", row))
            client.batch_inference_jobs.create(
                input_dataset_id="in", model=SMOLLM2, batch_inference_job_id="job"
            )
        folder = cloud.state.folder
        assert folder.is_dir()
    assert not folder.exists()  # and `model` checks that its engine is idle


# The clock.


def test_a_clock_runs_as_fast_as_it_is_told():
    fast = Clock(1000.0, start=0)
    before = fast.now()
    while fast.now() - before < 10:  # ten virtual seconds in ten milliseconds
        pass
    fast.advance(3600)
    assert fast.now() >= 3610
    assert fast.virtual(2) == 2000
    assert Clock.manual().virtual(2) == 2


@pytest.mark.parametrize("wrong", [lambda: Clock(-1), lambda: Clock().advance(-1)])
def test_time_does_not_run_backwards(wrong: Any):
    with pytest.raises(ValueError, match="0 or more"):
        wrong()
