"""What the public account offers to everyone: models, and shapes to deploy them in."""

from __future__ import annotations

from typing import Any

PUBLIC = "fireworks"  # the account that everyone may read
SMOLLM2 = f"accounts/{PUBLIC}/models/smollm2-135m-instruct"
EMULATED = "Emulated: every model here is answered by the shared SmolLM2-135M-Instruct."
PARAMETERS = 134_515_008
PRECISIONS = ["BF16", "FP8", "FP8_MM"]


def models_for_all() -> dict[str, dict[str, Any]]:
    """The models that everyone can use: one serverless, one for deployments only."""
    shared = {
        "kind": "HF_BASE_MODEL",
        "state": "READY",
        "public": True,
        "description": EMULATED,
        "contextLength": 2048,
        "supportsTools": True,
        "supportedPrecisions": PRECISIONS,
        "huggingFaceUrl": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        "baseModelDetails": {
            "parameterCount": str(PARAMETERS),
            "defaultPrecision": "BF16",
            "worldSize": 1,
        },
        "status": {"code": "OK"},
    }
    on_demand = f"{SMOLLM2}-on-demand"
    return {
        SMOLLM2: {
            "name": SMOLLM2,
            "displayName": "SmolLM2 135M Instruct",
            "supportsServerless": True,
            **shared,
        },
        on_demand: {
            "name": on_demand,
            "displayName": "SmolLM2 135M Instruct, for deployments",
            "supportsServerless": False,
            **shared,
        },
    }


def shapes() -> dict[str, dict[str, Any]]:
    """Hardware and precision that go together, by name. All of it is emulated."""
    kinds = {
        "fast": ("NVIDIA_H100_80GB", "FP8", "FAST"),
        "throughput": ("NVIDIA_B200_180GB", "FP8_MM", "THROUGHPUT"),
        "full-precision": ("NVIDIA_H100_80GB", "BF16", "FULL_PRECISION"),
    }
    made = {}
    for shape, (accelerator, precision, preset) in kinds.items():
        name = f"accounts/{PUBLIC}/deploymentShapes/{shape}"
        made[name] = {
            "name": name,
            "baseModel": SMOLLM2,
            "displayName": shape,
            "description": "Emulated: no such hardware is here.",
            "acceleratorType": accelerator,
            "acceleratorCount": 1,
            "precision": precision,
            "presetType": preset,
            "parameterCount": str(PARAMETERS),
        }
    return made


def version(shape: dict[str, Any]) -> dict[str, Any]:
    """The one version that each shape has."""
    return {
        "name": f"{shape['name']}/versions/v1",
        "snapshot": shape,
        "validated": True,
        "latestValidated": True,
        "public": True,
    }
