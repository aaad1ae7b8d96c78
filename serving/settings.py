"""What an operator decides, from the environment. A wrong value stops the start."""

from __future__ import annotations

import hashlib
import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

Scope = Literal["inference", "admin"]
SCOPES: tuple[str, ...] = get_args(Scope)
MIN_KEY_CHARS = 16  # SHA-256 without salt is safe only for secrets nobody can guess
NEW_KEY = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ConfigurationError(ValueError):
    """A setting that cannot work: what was expected, what was found, what to do."""


class Key(NamedTuple):
    """One caller's key. The secret itself is not kept."""

    digest: bytes  # SHA-256 of the secret
    scopes: frozenset[str]

    @property
    def tenant(self) -> str:
        """A short public name of the key, for budgets, caches and metrics."""
        return f"key-{self.digest.hex()[:12]}"


class Settings(BaseSettings):
    """Every switch of the API. The environment variable is the name in capitals."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    # Who may call
    api_keys: SecretStr = SecretStr("")  # secret[:scope[+scope]], comma-separated
    api_keys_file: Path | None = None  # the same, one a line, for mounted secrets
    allow_anonymous: bool = False  # serve a public address without keys

    # What one caller may spend; 0 is no limit
    requests_per_minute: Count = 6_000
    tokens_per_minute: Count = 1_000_000
    limits_storage: str = "async+memory://"  # async+redis://… shares it among replicas

    # What one request may cost
    max_body_bytes: Positive = 1_048_576
    max_answers: Positive = 64  # prompts times n
    request_timeout_s: Seconds = 120.0
    body_timeout_s: Seconds = 20.0  # a client that trickles its body
    send_timeout_s: Seconds = 20.0  # a client that stops reading its answer

    # When to say no, and when to say goodbye
    ttft_target_ms: Positive = 3_000  # others' work ahead of a newcomer, at most
    stall_seconds: Seconds = 10.0  # no finished step for so long: /health/progress
    # Not ready, still serving, until balancers have noticed. Unless set: 5 s, but none
    # on loopback, where nobody balances.
    drain_seconds: Seconds | None = None

    # Idempotency keys
    idempotency_ttl_s: Seconds = 600.0
    idempotency_bytes: Positive = 16_777_216

    # The model
    device: Literal["cpu", "cuda"] = "cpu"
    rows: Positive = 32  # answers decoded at once
    context: Annotated[int, Field(ge=64, le=8192)] = 2048  # tokens in one row

    def drain_s(self, host: str) -> float:
        """How long to serve on after SIGTERM."""
        if self.drain_seconds is not None:
            return self.drain_seconds
        return 0.0 if is_loopback(host) else 5.0

    def check_exposure(self, host: str) -> None:
        """Refuse to serve everyone by accident: no keys and not only this machine."""
        if self.keys() or self.allow_anonymous or is_loopback(host):
            return
        raise ConfigurationError(
            f"Serving on {host} without API keys would let anyone spend this machine. "
            f"Expected API_KEYS or API_KEYS_FILE, found neither.\n"
            f"Make a key: {NEW_KEY}\n"
            f"then:       API_KEYS=<key> python model_api.py --serve --host {host}\n"
            f"or say that you mean it: ALLOW_ANONYMOUS=1"
        )

    def keys(self) -> tuple[Key, ...]:
        """Read all keys, from the variable and from the file."""
        entries = self.api_keys.get_secret_value().split(",")
        if self.api_keys_file:
            try:
                entries += self.api_keys_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(
                    f"API_KEYS_FILE: expected a readable text file with one key a "
                    f"line, found {error}. Correct the path or its permissions."
                ) from error
        entries = [entry.strip() for entry in entries]
        entries = [e for e in entries if e and not e.startswith("#")]
        return tuple(parse_key(entry, i) for i, entry in enumerate(entries, 1))


def parse_key(entry: str, position: int) -> Key:
    """Turn `secret[:scope[+scope]]` into a Key; `inference` is the default scope."""
    secret, _, scopes = entry.partition(":")
    names = frozenset((scopes or "inference").split("+"))
    if not names <= set(SCOPES):
        raise ConfigurationError(
            f"API key {position}: expected secret or secret:scope with scope one of "
            f"{' or '.join(SCOPES)} (joined by +), found scope {scopes!r}."
        )
    if len(secret) < MIN_KEY_CHARS or not secret.isascii():
        raise ConfigurationError(
            f"API key {position}: expected at least {MIN_KEY_CHARS} ASCII characters, "
            f"found {len(secret)}. Make one: {NEW_KEY}"
        )
    return Key(hashlib.sha256(secret.encode()).digest(), names)


def load(**overrides: Any) -> Settings:
    """Read the settings; a wrong value becomes one clear ConfigurationError."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc'])).upper()}={e['input']!r}: {e['msg']}."
            for e in error.errors()
        ]
        raise ConfigurationError(
            "\n".join(["Some settings cannot work:", *lines])
        ) from None


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
