"""The same jobs in Redis Streams: for workers on more than one machine.

    with redis_server(folder) as url, RedisJobs(url) as jobs: ...

One stream a priority, one consumer group, and what is known of a job in a hash. Each
call is one Lua script, which Redis runs whole and alone. Streams know no leases, only
how long an entry has been idle, so a lease is told in those terms: who leases for 30 s
claims the entry as idle for 12 hours less 30 s, and XAUTOCLAIM takes what has been idle
for 12 hours. A delay is the same with nobody at work.

What survives. `appendfsync always` has each write on the disk before it is answered:
what was answered stays, after kill -9 and after a power cut. With `everysec` a power
cut takes the last second or two; kill -9 takes nothing the kernel already had, but
Redis holds writes back for up to two seconds while the disk is busy, and answers them
all the same. Without `appendonly` all since the last snapshot is gone.

Autoscalers read the lag of the group `workers` of the stream `{jobs}:priority:0`.

Whose clock: the server's wall clock, for all workers. Should it jump ahead, leases end
early: jobs are done twice, and still acknowledged once. Should it jump back, what is
leased or delayed comes later by as much. Let it be slewed, not set.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import redis
from redis.backoff import ConstantBackoff
from redis.exceptions import AuthorizationError
from redis.retry import Retry

from course.process import child, free_port
from local_cloud.scaling.jobs import (
    KEEP_S,
    MAX_LEASE_S,
    MAX_TRIES,
    OPEN_JOBS,
    RAN_OUT,
    STATES,
    Job,
    JobsDown,
    JobsError,
    Status,
    check,
    check_submission,
    encoded,
    key_taken,
    lease_lost,
    queue_full,
)

INSTALL = "apt-get install -y redis-server"
ANSWER_S = 5.0  # a script takes microseconds; a disk that syncs may take longer

# KEYS[1] is the queue's name in braces, so that in a cluster all its keys are on one
# node. A job's hash is name:job:ID; of its fields, `entry` is its place in the stream
# of its priority. `finished` sorts ids by the time from which they are forgotten.
_COMMON = """
local name, group, half_day = KEYS[1], 'workers', 43200000
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function hash(id) return name .. ':job:' .. id end
local function get(id, field) return redis.call('HGET', hash(id), field) end
local function stream(id) return name .. ':priority:' .. get(id, 'priority') end
local function turn(id, state)
  local old = get(id, 'state')
  if old then redis.call('HINCRBY', name .. ':counts', old, -1) end
  redis.call('HINCRBY', name .. ':counts', state, 1)
  redis.call('HSET', hash(id), 'state', state)
end
local function finish(id, state, forget, err)
  turn(id, state)
  redis.call('XACK', stream(id), group, get(id, 'entry'))
  redis.call('XDEL', stream(id), get(id, 'entry'))
  redis.call('ZADD', name .. ':finished', forget, id)
  if err then redis.call('HSET', hash(id), 'error', err)
  else redis.call('HDEL', hash(id), 'error') end
end
local function hold(id, worker, ms)
  redis.call('XCLAIM', stream(id), group, worker, 0, get(id, 'entry'),
    'IDLE', half_day - ms, 'JUSTID')
  redis.call('HSET', hash(id), 'due', now + ms, 'worker', worker)
end
local function holds(id, token)
  local is = redis.call('HMGET', hash(id), 'state', 'tries', 'due')
  return is[1] == 'leased' and is[2] == token and tonumber(is[3]) > now
end
"""
_SUBMIT = """
local id, key, payload, priority, tries, deadline, bound = unpack(ARGV)
if redis.call('EXISTS', hash(id)) == 1 then return {id, payload} end
for _, old in ipairs(redis.call('ZRANGEBYSCORE', name .. ':finished', '-inf', now,
    'LIMIT', 0, 10)) do
  redis.call('HINCRBY', name .. ':counts', get(old, 'state'), -1)
  local its = get(old, 'key')
  its = its and name .. ':key:' .. its
  if its and redis.call('GET', its) == old then redis.call('DEL', its) end
  redis.call('DEL', hash(old))
  redis.call('ZREM', name .. ':finished', old)
end
if key ~= '' then
  local known = redis.call('GET', name .. ':key:' .. key)
  local forget = known and redis.call('ZSCORE', name .. ':finished', known)
  if known and not (forget and tonumber(forget) <= now) then
    return {known, get(known, 'payload')}
  end
end
local open = redis.call('HMGET', name .. ':counts', 'waiting', 'leased')
if (open[1] or 0) + (open[2] or 0) >= tonumber(bound) then return {} end
local place = name .. ':priority:' .. priority
if redis.call('EXISTS', place) == 0 then
  redis.call('XGROUP', 'CREATE', place, group, 0, 'MKSTREAM')
end
redis.call('HSET', hash(id), 'payload', payload, 'priority', priority, 'tries', 0,
  'max_tries', tries, 'entry', redis.call('XADD', place, '*', 'id', id))
if deadline ~= '' then redis.call('HSET', hash(id), 'deadline', now + deadline) end
if key ~= '' then
  redis.call('HSET', hash(id), 'key', key)
  redis.call('SET', name .. ':key:' .. key, id)
end
turn(id, 'waiting')
return {id, payload}
"""
_LEASE = """
local worker, lease, keep, ran_out = unpack(ARGV)
local function overdue(place)
  local cursor = '0-0'
  repeat
    local found = redis.call('XAUTOCLAIM', place, group, worker, half_day, cursor,
      'COUNT', 1)
    if found[2][1] then return found[2][1] end
    cursor = found[1]
  until cursor == '0-0'
end
local function fresh(place)
  local found = redis.call('XREADGROUP', 'GROUP', group, worker, 'COUNT', 1,
    'STREAMS', place, '>')
  return found and found[1][2][1]
end
for priority = 9, 0, -1 do
  local place = name .. ':priority:' .. priority
  local entry
  repeat
    entry = nil
    if redis.call('XLEN', place) > 0 then entry = overdue(place) or fresh(place) end
    if entry then
      local id = entry[2][2]
      local is = redis.call('HMGET', hash(id), 'payload', 'tries', 'max_tries',
        'deadline', 'state')
      if is[5] ~= 'waiting' and is[5] ~= 'leased' then
        redis.call('XACK', place, group, entry[1])
        redis.call('XDEL', place, entry[1])
      elseif is[4] and tonumber(is[4]) <= now then
        finish(id, 'expired', now + keep)
      elseif tonumber(is[2]) >= tonumber(is[3]) then
        finish(id, 'dead', '+inf', ran_out)
      else
        turn(id, 'leased')
        hold(id, worker, lease)
        return {id, is[1], redis.call('HINCRBY', hash(id), 'tries', 1)}
      end
    end
  until not entry
end
"""
_ACK = """
local id, token, result, keep = unpack(ARGV)
if get(id, 'state') == 'done' and get(id, 'tries') == token then return 1 end
if not holds(id, token) then return 0 end
redis.call('HSET', hash(id), 'result', result)
finish(id, 'done', now + keep)
return 1
"""
_NACK = """
local id, token, delay, err = unpack(ARGV)
if not holds(id, token) then return 0 end
if tonumber(token) >= tonumber(get(id, 'max_tries')) then
  finish(id, 'dead', '+inf', err)
else
  turn(id, 'waiting')
  hold(id, get(id, 'worker'), delay)
  redis.call('HSET', hash(id), 'error', err)
end
return 1
"""
_EXTEND = """
local id, token, lease = unpack(ARGV)
if not holds(id, token) then return 0 end
hold(id, get(id, 'worker'), lease)
return 1
"""
_CANCEL = """
local id, keep = unpack(ARGV)
local state = get(id, 'state')
if state ~= 'waiting' and state ~= 'leased' and state ~= 'dead' then return 0 end
if state == 'waiting' then  -- its entry goes when a worker comes by: deleting what was
  turn(id, 'cancelled')     -- never delivered would make the group's lag unknown
  redis.call('ZADD', name .. ':finished', now + keep, id)
  redis.call('HDEL', hash(id), 'error')
else
  finish(id, 'cancelled', now + keep)
end
return 1
"""
_GET = """
local forget = redis.call('ZSCORE', name .. ':finished', ARGV[1])
if forget and tonumber(forget) <= now then return {} end
local is = redis.call('HMGET', hash(ARGV[1]), 'state', 'tries', 'result', 'error',
  'deadline')
if is[1] == 'waiting' and is[5] and tonumber(is[5]) <= now then is[1] = 'expired' end
return is
"""
_SCRIPTS = {
    "submit": _SUBMIT,
    "lease": _LEASE,
    "ack": _ACK,
    "nack": _NACK,
    "extend": _EXTEND,
    "cancel": _CANCEL,
    "get": _GET,
}


class RedisJobs:
    """Jobs in the Redis at `url`. Opens nothing before the first call.

    Args:
        url: `redis://host:port/database`. Redis 7 or newer.
        name: of the queue; one Redis holds any number.
        bound: unfinished jobs beyond which `submit` raises QueueFull.
        keep_s: for so long a finished job can be asked for, and its key is taken.

    Workers should keep their names when they start again: Redis remembers each.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "jobs",
        bound: int = OPEN_JOBS,
        keep_s: float = KEEP_S,
    ) -> None:
        self.url, self.name, self.bound, self.keep_s = url, name, bound, keep_s
        # Once more after a broken connection: after a restart of Redis all are. No
        # script does harm when it runs twice; a lease that was not heard of ends.
        self._redis = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=ANSWER_S,
            socket_connect_timeout=ANSWER_S,
            retry=Retry(ConstantBackoff(0.01), 1),
        )
        self._scripts = {
            call: self._redis.register_script(_COMMON + text)
            for call, text in _SCRIPTS.items()
        }

    def submit(
        self,
        payload: Any,
        *,
        key: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        max_tries: int = MAX_TRIES,
    ) -> str:
        check_submission(key, priority, deadline_s, max_tries)
        text, id = encoded(payload, "payload"), secrets.token_hex(16)
        deadline = "" if deadline_s is None else _ms(deadline_s)
        rest = (priority, max_tries, deadline, self.bound)
        found = self._run("submit", id, key or "", text, *rest)
        if not found:
            raise queue_full(self.bound)
        if found[1] != text:
            raise key_taken(key or "")
        return found[0]

    def lease(self, worker: str, lease_s: float) -> Job | None:
        check("lease_s", lease_s, 0, MAX_LEASE_S)
        keep = _ms(self.keep_s)
        found = self._run("lease", worker, _ms(lease_s), keep, RAN_OUT)
        return Job(found[0], json.loads(found[1]), int(found[2])) if found else None

    def ack(self, job: Job, result: Any = None) -> None:
        self._held("ack", job, encoded(result, "result"), _ms(self.keep_s))

    def nack(self, job: Job, delay_s: float = 0.0, error: str | None = None) -> None:
        check("delay_s", delay_s, 0, MAX_LEASE_S)
        self._held("nack", job, _ms(delay_s), error or "")

    def extend(self, job: Job, lease_s: float) -> None:
        check("lease_s", lease_s, 0, MAX_LEASE_S)
        self._held("extend", job, _ms(lease_s))

    def cancel(self, id: str) -> bool:
        return bool(self._run("cancel", id, _ms(self.keep_s)))

    def get(self, id: str) -> Status | None:
        found = self._run("get", id)
        if not found or found[0] is None:
            return None
        state, tries, result, error = found[:4]
        value = None if result is None else json.loads(result)
        return Status(id, state, int(tries), value, error or None)

    def dead(self, count: int = 100) -> list[Status]:
        name, last = f"{{{self.name}}}:finished", "+inf"
        with _explained(self.url):
            ids = self._redis.zrangebyscore(name, last, last, start=0, num=count)
        return [found for id in ids if (found := self.get(str(id)))]

    def counts(self) -> dict[str, int]:
        with _explained(self.url):
            found = self._redis.hgetall(f"{{{self.name}}}:counts")
        return {state: int(found.get(state, 0)) for state in STATES}

    def close(self) -> None:
        """Closes the connections; the next call opens one again."""
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _held(self, call: str, job: Job, *values: str | int) -> None:
        if not self._run(call, job.id, job.token, *values):
            raise lease_lost(job)

    def _run(self, call: str, *values: str | int) -> Any:
        with _explained(self.url):
            return self._scripts[call](keys=[f"{{{self.name}}}"], args=values)


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Tells what may be over soon (JobsDown) from what a person has to mend."""
    try:
        yield
    except (redis.AuthenticationError, AuthorizationError) as error:
        raise JobsError(
            f"Expected Redis at {shown(url)} to let us in, found: {error}. Put the "
            "user and password into the URL: redis://user:password@host:port/0."
        ) from error
    except (redis.ConnectionError, redis.TimeoutError) as error:  # loading, too
        raise JobsDown(
            f"Expected Redis to answer at {shown(url)}, found: {error}. Start it, and "
            "call again: what was acknowledged is kept."
        ) from error
    except redis.RedisError as error:
        raise JobsError(
            f"Expected Redis at {shown(url)} to do its part, found: {error}. It must "
            "be 7 or newer, allow scripts to write, and have memory left."
        ) from error


def shown(url: str) -> str:
    """A URL for an error message: without user, password and options."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


@contextmanager
def redis_server(
    folder: Path, *, port: int | None = None, fsync: str = "always"
) -> Iterator[str]:
    """A Redis of one's own on loopback, its data in `folder`; gives its URL.

    Args:
        folder: must exist; what an earlier Redis left there is loaded.
        port: None for a free one.
        fsync: `always`, `everysec` or `no`: see above.
    """
    binary = shutil.which("redis-server")
    if not binary:
        raise JobsDown(
            f"Expected redis-server in PATH, found none. Install it: {INSTALL}"
        )
    port = port or free_port()
    url = f"redis://127.0.0.1:{port}/0"
    options = {"bind": "127.0.0.1", "port": port, "dir": folder, "save": ""}
    options |= {"appendonly": "yes", "appendfsync": fsync, "daemonize": "no"}
    argv = [binary]
    for option, value in options.items():
        argv += [f"--{option}", str(value)]
    with child(argv, ready=lambda: _answers(url)):
        yield url


def _answers(url: str) -> bool:
    with redis.Redis.from_url(
        url, socket_timeout=1, retry=Retry(ConstantBackoff(0), 0)
    ) as probe:
        try:
            return bool(probe.ping())
        except redis.RedisError:
            return False
