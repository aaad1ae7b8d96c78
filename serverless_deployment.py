"""A language model as a function: paid by the millisecond, asleep in between.

A server waits for callers, and its bill runs while it waits. A function costs nothing
until it is called. The price is hidden in the first call: somebody has to start a
process, import its libraries and load a model while a caller waits. And nobody asks
before a function is frozen, copied, or killed at its deadline in mid-sentence.

You will see: what happens between a call and its answer; what a cold start consists of
and four ways around it; what memory buys and what a deadline does; a pipeline of
events that survives the death of its workers.

Run it:     python serverless_deployment.py              all four sections, a minute
            python serverless_deployment.py 2 --quick    one section, rough, soon
Import it:  from serverless_deployment import handler
Needs:      pip install -r requirements.txt (the first run also builds the model)
Next:       deploy the same file for real: deploy/functions/
"""

from __future__ import annotations

# This file is the function that gets deployed. Whatever it imports here, every cold
# start pays for, so the demonstrations import what they need when they run.
import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

    from course.lesson import Run
    from local_cloud.functions import Function, Platform
    from models import Piece, Sampling
    from models.lean import Lean

MAX_TOKENS = 64  # of an answer that names no limit
MOST_TOKENS = 512  # of any answer: with a deadline, a budget is part of the request
# What the function is deployed with. The first would make numpy start threads while it
# is imported; the second would make onnxruntime report its use; the third keeps
# all memory in one heap of large pages: faster to fill, and to fork.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1000000000",
}
QUESTION = {"prompt": "Name a colour.", "max_tokens": 8}  # what the demonstrations ask
FIRST_TOKEN = {**QUESTION, "max_tokens": 1}
SUMMARISE = "Summarize the following text in one short sentence:\n\n"

# ## Function-as-a-Service (FaaS) concepts
#
# A function is a file with a handler: an event goes in, a result comes out, both JSON.
# The platform decides when a process (a sandbox) is started for it, gives it one event
# at a time, freezes it in between and ends it when it likes. What a module holds stays
# from one call to the next, as long as the sandbox lives, and nobody says how long
# that is. So: keep what is dear to make (the model), keep nothing that matters.


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Answer a prompt, or summarise a text.

    Args:
        event: {"prompt": ...} or {"text": ...}, and if you like "max_tokens",
            "temperature" and "seed".
        context: Lambda's; of it, the time that is left until the deadline.

    Returns:
        The text, why it ended ("stop", "length" or "deadline"), its tokens, tokens a
        second and the seed that gives the same text again. For an event that cannot be
        answered {"error": ...}: it is the result, and not an exception, because the
        platform repeats what raises, and this would fail each time.
    """
    kept = LOADED or initialise()
    model: Lean = kept["model"]
    try:
        prompt, sampling = read_event(event, kept["random"])
        steps = model.stream(model.prompt(prompt), sampling)
    except ValueError as refused:
        return {"error": str(refused)}
    answer = answer_in_time(steps, context.get_remaining_time_in_millis)
    return {**answer._asdict(), "seed": sampling.seed, "revision": model.revision}


def read_event(event: Any, random: Random) -> tuple[str, Sampling]:
    """What is asked for, and how to generate it.

    Raises:
        ValueError: expected, found, and what to send instead.
    """
    from models import Sampling

    asked = event if isinstance(event, dict) else {}
    words = [asked[name] for name in ("prompt", "text") if name in asked]
    if len(words) != 1 or not isinstance(words[0], str) or not words[0].strip():
        raise ValueError(
            'event: expected one of "prompt" and "text" with some words, found '
            f'{event!r:.80}; send {{"prompt": "..."}}'
        )
    seed = asked.get("seed")
    sampling = Sampling(
        max_tokens=asked.get("max_tokens", MAX_TOKENS),
        temperature=asked.get("temperature", 0.0),
        seed=random.getrandbits(53) if seed is None else seed,
    )
    if sampling.max_tokens > MOST_TOKENS:
        raise ValueError(
            f"max_tokens: expected 1 to {MOST_TOKENS}, found {sampling.max_tokens}; "
            "ask for less"
        )
    return SUMMARISE * ("text" in asked) + words[0], sampling


def deployed(name: str, **settings: Any) -> Function:
    """This file's handler as a function with one whole CPU, unless told otherwise."""
    from local_cloud.functions import Function

    what: dict[str, Any] = {
        "handler": "serverless_deployment.handler",
        "environment": ENVIRONMENT,
        "memory_mb": 1769,
        "timeout_s": 30.0,
    }
    return Function(name, **{**what, **settings})


def demo_concepts(run: Run) -> None:
    """Follow one sandbox from its start into its freeze; ask for more than allowed."""
    from local_cloud.functions import cold_starts, trials

    cloud = trials.platform(run)
    run.fact("limits are enforced by", cloud.kind)
    run.predict("The first caller waits for the model; all others for their answer.")
    function = deployed("concepts", reserved=2)
    cloud.deploy(function)
    calls = trials.three_calls(cloud, function.name, QUESTION)
    run.table(cold_starts.calls_table(calls))
    run.say(f"{cloud.invoke(function.name, QUESTION).report}")
    # What runs here runs there: AWS's SDK, told another address, sees no difference.
    answer = trials.by_boto3(cloud, function.name, QUESTION)
    run.fact("the answer as boto3 gets it with endpoint_url", answer["text"])
    refused = trials.refused(cloud, function.name, QUESTION, callers=3)
    run.fact("three callers at once, concurrency 2 reserved: refused with 429", refused)
    added = trials.overhead(cloud, calls=200 if run.quick else 1000)
    run.fact("the platform's own part of a warm call, median", added.median, "ms")
    thawed = trials.overhead(cloud, calls=5 if run.quick else 15, frozen=True)
    first, second, _ = calls.values()
    run.conclude(
        f"The first caller waited {first.total_ms / second.total_ms:.1f} times as long "
        f"as the second, for {first.billed_ms / second.billed_ms:.1f} times the price. "
        f"To thaw a frozen sandbox takes {thawed.median - added.median:.1f} ms more."
    )


# ## Cold start mitigation strategies
#
# Pitfall: the first caller waits for a second, and so does everyone whom a burst sends
# to a new sandbox. Cure, from free to dear: import and load less (what follows); start
# from a snapshot (the hooks below); call the function now and then to keep a sandbox;
# pay for sandboxes that wait (provisioned concurrency).
#
# The init phase is the import of this file. It loads the model in its lean form
# (models/lean.py): no server, no engine, no thread. Where the model's folder can be
# written, as here, the weights are kept packed as this CPU wants them, and are mapped
# instead of read. A zip on Lambda cannot be written: there each init reads and packs
# them anew, and the more a snapshot is worth.

SNAPSHOT = os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start"
LOADED: dict[str, Any] = {}  # what the init phase leaves to the handler


def initialise() -> dict[str, Any]:
    """The init phase: everything that is dear to make and the same for all callers."""
    from models import lean

    LOADED["model"] = lean.load(to_be_forked=SNAPSHOT)
    seed_generators()
    return LOADED


def seed_generators() -> None:
    """Let this process draw random numbers that no other one draws."""
    import random

    import numpy

    own = LOADED.setdefault("random", random.Random())
    own.seed()  # from the operating system
    random.seed()
    # numpy's other kind of generator, `default_rng`, takes 0.5 ms here to make anew.
    numpy.random.seed(own.getrandbits(32))


def before_snapshot() -> None:
    """Do once, for all clones, what each would do first: no caller waits for this."""
    LOADED["model"].warm_up()
    if any(name in os.environ for name in STORES):  # the pipeline of the last section
        from aws_lambda_powertools.utilities import batch, idempotency  # noqa: F401

        storage()


def after_restore() -> None:
    """Make anew what no two clones may share.

    All clones wake up with the same generators in the same state. Without this, two
    callers get the same "random" text, and would get the same "unique" identifiers.
    """
    seed_generators()


def register_hooks() -> None:
    """Tell the runtime client, which calls them around the snapshot."""
    import snapshot_restore_py as snapshots

    snapshots.register_before_snapshot(before_snapshot)
    snapshots.register_after_restore(after_restore)


# In a sandbox, and there alone, the import is the init phase. Everywhere else (a
# test, an editor, the demonstrations) importing this file loads nothing.
if "AWS_LAMBDA_RUNTIME_API" in os.environ:
    initialise()
    if SNAPSHOT:
        register_hooks()


def demo_cold_starts(run: Run) -> None:
    """Take a cold start apart, start in five ways in turns, meet a burst."""
    from functools import partial

    from local_cloud.functions import cold_starts, trials

    cloud, turns = trials.platform(run), 2 if run.quick else 3
    with run.progress("taking cold starts apart", total=2) as advance:
        ways = {"naive": {}, "tuned": ENVIRONMENT}
        starts = cold_starts.compositions(ways, repeats=turns, on_each=advance)
    run.picture(partial(trials.draw_phases, starts), "cold-start", size=(10, 4.6))
    _, packed, never = cold_starts.openings(repeats=1, environment=ENVIRONMENT)
    run.say(
        "Tempting: without packing the weights the model opens in "
        f"{never.open_cpu_ms:.0f} ms instead of {packed.open_cpu_ms:.0f}. Then each "
        f"token takes {never.token_cpu_ms:.0f} ms instead of {packed.token_cpu_ms:.1f}."
    )
    run.predict("Tuned starts twice as fast as naive; a snapshot 70 times as fast.")
    told = compare_starts(run, cloud, turns)
    naive, tuned, snapshot = (told[k] for k in ("naive", "tuned", "snapshot"))
    burst_ms, cold, memory = cold_starts.meet_burst(
        cloud, deployed("burst"), FIRST_TOKEN, callers=16
    )
    run.fact("16 callers at once, all answered after", burst_ms, "ms")
    run.fact("new clones that it took", cold)
    run.fact("memory that such a clone has for itself", memory, "MB")
    run.conclude(
        f"Tuned starts {naive / tuned:.1f} times as fast as naive, a snapshot "
        f"{naive / snapshot:.0f} times, in {snapshot:.1f} ms. Keeping one sandbox warm "
        "helps the callers that come one by one, and not the second of two."
    )


def compare_starts(run: Run, cloud: Platform, turns: int) -> dict[str, float]:
    """The first call by strategy; gives the milliseconds before the handler ran."""
    from local_cloud.functions import cold_starts

    naive = {"handler": "deploy.functions.naive.handler", "environment": {}}
    ways = [
        deployed("naive", keep_alive_s=0.0, **naive),
        deployed("tuned", keep_alive_s=0.0),
        deployed("snapshot", keep_alive_s=0.0, snapshot=True),
        deployed("provisioned", keep_alive_s=0.0, provisioned=1),
    ]
    with run.progress("first calls"):
        told = cold_starts.first_calls(cloud, ways, FIRST_TOKEN, turns=turns)
        # Its timer would be `events.Schedule("rate(5 minutes)", ping)`.
        told["kept warm"], told["the second of two"] = cold_starts.kept_warm(
            cloud, deployed("kept"), FIRST_TOKEN, turns=turns
        )
    idle = ["nothing", "nothing", "its cache", "a sandbox", "a timer", "a timer"]
    run.table(cold_starts.strategies_table(told, idle))
    return {name: cold_starts.ready_ms(calls) for name, calls in told.items()}


# ## Memory and timeout optimization
#
# Memory is the only knob, and it turns the CPU as well: 1,769 MB buy one whole CPU, a
# quarter of that a quarter of its time. And every call has a deadline, at which the
# platform kills the process: the caller gets an error instead of the half of an answer
# that was there, pays for it, and the next one pays for a cold start.
#
# Pitfall: too little memory makes the same work slow, then late, then dead. Cure:
# measure the work at each size; and where time can run out, stop in time and say so.

HAND_OVER_MS = 50.0  # to hand the answer over: two or three periods of the CPU's quota
MARGIN = 2.0  # the next step may take so many times the slowest of the last ones
RECENT = 4  # steps


class Answer(NamedTuple):
    """An answer and how it came about."""

    text: str
    finish_reason: str
    tokens: int
    tokens_per_s: float | None


def answer_in_time(
    steps: Iterator[Piece | None], remaining_ms: Callable[[], float]
) -> Answer:
    """Generate until the answer ends, or until there is no time for one more step.

    How long a step takes depends on the memory the function was given, on the CPU it
    got and on its neighbours. So it is measured, here and now, and not configured.
    """
    text, tokens, reason = "", 0, "deadline"
    took: list[float] = []  # milliseconds of each step
    left = remaining_ms()
    while left > HAND_OVER_MS + MARGIN * max(took[-RECENT:], default=0.0):
        piece = next(steps)
        left, before = remaining_ms(), left
        took.append(before - left)
        if piece is None:
            continue
        text, tokens = text + piece.text, tokens + 1
        if piece.finish_reason is not None:
            reason = piece.finish_reason
            break
    decoding = took[len(took) - tokens + 1 :]
    rate = 1000 * len(decoding) / sum(decoding) if sum(decoding) else None
    return Answer(text, reason, tokens, rate)


def demo_memory(run: Run) -> None:
    """Turn the knob; run into the deadline with and without looking; add it up."""
    from functools import partial

    from local_cloud.functions import costs, trials, tuning

    cloud = trials.platform(run)
    sizes = (256, 1024, 1769) if run.quick else (128, 256, 512, 1024, 1769, 3008)
    calls = 2 if run.quick else 3
    run.predict("Twice the memory takes half the time and costs the same, up to 1769.")
    function = deployed("tuning")
    with run.progress("tuning", total=len(sizes) * (1 + calls)) as advance:
        tuned = tuning.tune(
            cloud, function, QUESTION, sizes_mb=sizes, calls=calls, on_call=advance
        )
    run.table(tuning.table(tuned))
    run.picture(lambda one, two: tuning.draw_curve(one, two, tuned), "power", panels=2)
    run_out_of_time(run, cloud)
    size = {"memory_mb": 1769, "vcpus": 1, "memory_gb": 2}  # of it, and of a container
    for name, value, unit in costs.facts(**size):
        run.fact(name, value, unit)
    run.picture(partial(costs.draw_month, **size, call_s=1.0), "month")
    run.conclude(
        f"Cheapest at {tuned.cheapest.memory_mb} MB, fastest at "
        f"{tuned.fastest.memory_mb} MB, balanced at {tuned.balanced().memory_mb} MB. "
        f"Prices: {costs.LAMBDA_X86.name}, {costs.LAMBDA_X86.region}, as listed "
        f"{costs.LAMBDA_X86.read}."
    )


def run_out_of_time(run: Run, cloud: Platform) -> None:
    """A second for 200 tokens on a third of a CPU: two handlers, and who calls next."""
    from local_cloud.functions import trials

    small = {"memory_mb": 512, "timeout_s": 1.0}
    naive = "deploy.functions.naive.handler"
    much = {"prompt": "Tell me a long story about the sea.", "max_tokens": 200}
    ways = {
        "looks at the time": deployed("looks", **small),
        "does not": deployed("blind", handler=naive, **small),
    }
    run.table(trials.deadlines(cloud, ways, much, FIRST_TOKEN))


# ## Event-driven AI applications
#
# The other way to be called: not by a caller who waits, but by what happens. An object
# is put into a bucket, the bucket sends a message, a queue keeps it, and the platform
# hands messages over in batches. Whatever dies on the way, the message comes again. So
# everything may happen twice, and the handler must see to it that twice is as good as
# once: the summary is written under a key that can exist only once, in one transaction.
# Powertools remembers what was done, which spares the work; it cannot replace the key.
#
# One bad document must not bring the others back: the answer names those that failed
# (`batchItemFailures`), and what fails again and again goes to the dead letters.
#
# Three numbers belong together. A message is hidden for longer than its worker may run,
# or two work on it at once: six times as long where batches have to wait their turn,
# half a second more where none does. By then, what a dead worker had begun is free
# again. And it is received so often that some deaths do not bury a good document.

TIMEOUT_S, VISIBILITY_S, MAX_RECEIVES = 2.5, 3.0, 5
STORES = ("IDEMPOTENCY_TABLE", "DATA")  # on AWS the first, here the second


def summarise(event: Any, context: Any) -> Any:
    """Summarise the texts that a batch of messages tells of; name those that failed."""
    from aws_lambda_powertools.utilities import batch

    processor = batch.BatchProcessor(
        batch.EventType.SQS, raise_on_entire_batch_failure=False
    )
    return batch.process_partial_response(event, summarise_message, processor, context)


def summarise_message(record: Any, lambda_context: Any) -> None:
    """Summarise each object that one message tells of, unless that was done before."""
    from urllib.parse import unquote_plus

    from aws_lambda_powertools.utilities import idempotency

    store = storage()
    config = idempotency.IdempotencyConfig(lambda_context=lambda_context)
    once = idempotency.idempotent_function(
        summarise_object,
        data_keyword_argument="what",
        persistence_store=store.done,
        config=config,
    )
    for put in json.loads(record.body)["Records"]:
        bucket, thing = put["s3"]["bucket"]["name"], put["s3"]["object"]
        key, version = unquote_plus(thing["key"]), thing["sequencer"]
        what = {"bucket": bucket, "key": key, "version": version}
        once(what=what, store=store, context=lambda_context)


def summarise_object(what: dict[str, str], store: Any, context: Any) -> str:
    """Summarise an object as it is now; a newer text has a message of its own.

    Raises:
        ValueError: the text cannot be summarised. The message comes again, in vain, and
            ends among the dead letters, where somebody looks.
        TimeoutError: there was no time; half a summary is none.
    """
    answer = handler({"text": store.read(what["bucket"], what["key"])}, context)
    if "error" in answer:
        raise ValueError(f"{what['key']}: {answer['error']}")
    if answer["finish_reason"] == "deadline":
        raise TimeoutError(f"{what['key']}: no time left to finish its summary")
    store.write(**what, text=answer["text"])
    return answer["text"]


def storage() -> Any:
    """S3 and DynamoDB on AWS; a folder and a file here, with the same face."""
    return open_storage(*map(os.environ.get, STORES))


@cache  # dear to make: a sandbox keeps it
def open_storage(table: str | None, folder: str | None) -> Any:
    """The storage that is named.

    Raises:
        LookupError: none is.
    """
    if table:
        from deploy.functions.aws import Storage as AwsStorage

        return AwsStorage(table)
    if not folder:
        raise LookupError(
            "storage: expected IDEMPOTENCY_TABLE (a DynamoDB table) or DATA (a folder) "
            "in the environment, found neither; set one"
        )
    from local_cloud.functions.storage import Storage

    return Storage(folder)


def demo_events(run: Run) -> None:
    """Put documents, kill workers, count summaries; then the handler elsewhere."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from local_cloud.functions import trials

    run.predict(
        "Each document is summarised once, whoever is killed; the blank one "
        "ends among the dead letters."
    )
    cloud = trials.platform(run)
    with TemporaryDirectory() as folder:
        pipeline(run, cloud, Path(folder))
    elsewhere(run, cloud)


def pipeline(run: Run, cloud: Platform, data: Path) -> None:
    """Bucket, queue, batches, dead letters; two workers are killed at work."""
    from local_cloud.functions import trials

    function = deployed(
        "summarise",
        handler="serverless_deployment.summarise",
        environment={**ENVIRONMENT, "DATA": str(data)},
        timeout_s=TIMEOUT_S,
        snapshot=True,
    )
    cloud.deploy(function)
    queue = {"visibility_s": VISIBILITY_S, "max_receives": MAX_RECEIVES}
    with run.progress("summarising"):
        table, example = trials.run_pipeline(
            cloud, function, data, kills=2, batch_size=2, **queue
        )
    run.say(example)
    run.table(table)


# Elsewhere the words differ, and one thing more. Google's Cloud Run and Azure's plans
# give one process many requests at once: eight callers share one model and one engine
# (deploy/functions/instance.py), where Lambda has eight sandboxes, unless its functions
# run on instances that one rents (Managed Instances take several). Neither has
# snapshots for Python; both sell instances that wait. At its deadline Lambda kills the
# sandbox, Cloud Run answers 504 and lets it run on. The handler is the same: only what
# an event looks like and how the answer is handed over is written anew, in
# deploy/functions/google/ and deploy/functions/azure/.


def elsewhere(run: Run, cloud: Platform) -> None:
    """Eight callers at once: eight sandboxes, or one process as on Cloud Run."""
    from local_cloud.functions import trials

    callers, function = 8, deployed("eight", snapshot=True)
    here = trials.sandboxes_at_once(cloud, function, QUESTION, callers)
    there = trials.process_at_once(QUESTION, callers)
    run.table(trials.two_platforms(here, there, callers))
    run.conclude(
        f"{'The same' if here.answer == there.answer else 'Not the same'} answer from "
        f"both. The process that batches served {callers} callers "
        f"{here.took_ms / there.took_ms:.1f} times as fast."
    )


SECTIONS = [
    ("Function-as-a-Service (FaaS) concepts", demo_concepts),
    ("Cold start mitigation strategies", demo_cold_starts),
    ("Memory and timeout optimization", demo_memory),
    ("Event-driven AI applications", demo_events),
]


def main(argv: list[str] | None = None) -> int:
    """Run the lesson."""
    import models
    from course import lesson
    from models import packed

    models.prepare()
    packed.ensure()
    return lesson.run(
        doc=__doc__,
        sections=[lesson.Section(*section) for section in SECTIONS],
        argv=argv,
        number=3,
        model_digest=models.prepare,
        after="read deploy/functions/template.yaml, then deploy the same file",
    )


if __name__ == "__main__":
    raise SystemExit(main())
