"""The parts of the OpenAPI document that FastAPI cannot read off the code."""

from typing import Any

from service.fields import MAX_PATH_LENGTH
from service.schemas import ProblemView
from service.uploads import FILES, REQUIRED

_FILE_DESCRIPTIONS = {
    "model": "The checkpoint: `.pt`/`.pth` (a state dict, bare or in a dict) or `.safetensors`.",
    "samples": "Clean images: `.npz` or `.safetensors` with `images` (uint8 NHWC, or float NCHW in "
    "[0, 1]) and `labels`, or a zip of class folders of PNG or JPEG; one image per class is enough.",
    "evaluation": "Clean, labelled images, like `samples`; used only to measure accuracy.",
    "triggered": "Triggered images with their true `labels` and the attack's `target` (a number, or one "
    "per image), as `.npz` or `.safetensors`; used only to measure the attack's success.",
}

_TEXTS: dict[str, dict[str, Any]] = {
    "architecture": {
        "type": "string",
        "description": "A name of `GET /architectures`; may be left out when the state dict fits "
        "one of the built-in ones only.",
    },
    "architecture_args": {"type": "string", "description": "JSON object of its arguments."},
    "method": {"type": "string", "default": "auto", "description": "A name of `GET /methods`."},
    "params": {"type": "string", "description": "JSON object of the method's parameters."},
    "seed": {
        "type": "integer",
        "default": 0,
        "minimum": 0,
        "description": "What every random choice of the job starts from.",
    },
    "mean": {
        "type": "string",
        "description": "Comma list, one per channel.",
        "example": "0.5,0.5,0.5",
    },
    "std": {
        "type": "string",
        "description": "Comma list, one per channel.",
        "example": "0.5,0.5,0.5",
    },
    "priority": {
        "type": "integer",
        "default": 0,
        "minimum": -100,
        "maximum": 100,
        "description": "Jobs of a higher priority are worked on first.",
    },
    "cancel_after": {"type": "number", "description": "Seconds after which the job is cancelled."},
    "metadata": {"type": "string", "description": "JSON object that comes back with the job."},
    "path": {
        "type": "string",
        "maxLength": MAX_PATH_LENGTH,
        "description": "The model's path in your repository: one printable line.",
    },
}

CREATE_JOB: dict[str, Any] = {
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "schema": {"type": "string", "minLength": 1, "maxLength": 255},
            "description": "A repeated request with this key and payload returns the first job.",
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": list(REQUIRED),
                    "additionalProperties": False,
                    "properties": {
                        **{
                            name: {
                                "type": "string",
                                "format": "binary",
                                "description": _FILE_DESCRIPTIONS[name],
                            }
                            for name in FILES
                        },
                        **_TEXTS,
                    },
                }
            }
        },
    },
}

TRIGGER_ARRAYS = (
    "Arrays by name, for `numpy.load`: of T triggers `target` (T,), -1 where each class is sent to "
    "another one, `mask` (T, 1, H, W), `pattern` and `added` (T, C, H, W), and `shift` (T, 2, H, W), in "
    "pixels to the right and below: an image under a trigger is `(bent * (1 - mask) + pattern * mask + "
    "added).clip(0, 1)`, where `bent` has each pixel from so far away; of M samples their places in the "
    "uploaded file `sample` (M,), their `label` (M,), and the classes that they get from the model as it "
    "came and as it goes, clean (`clean_before`, `clean_after`, (M,)) and under each trigger "
    "(`stamped_before`, `stamped_after`, (T, M)); the first K of these samples as images, `clean` "
    "(K, C, H, W) and `stamped` (T, K, C, H, W)."
)

TRIGGER_PICTURE = (
    "Mask, pattern, and the pattern as far as the mask shows it; or what is added to every pixel; or how "
    "far to the right and how far below each pixel is taken from (grey is nothing, white and black are "
    "the most, either way). Below them samples of other classes, "
    "and the same samples under the trigger. Images that have neither one nor three channels are shown "
    "as the mean of their channels."
)

_STATUSES = {
    400: "The request is malformed, or its body is not a complete form.",
    401: "The token is missing or not valid.",
    403: "The token lacks the scope, which `WWW-Authenticate` names; or a foreign origin.",
    404: "There is no such job, or it has no such file.",
    408: "The request came too slowly.",
    409: "The job's state does not allow it.",
    410: "No longer kept.",
    413: "Too large.",
    414: "The address is too long.",
    416: "The range lies outside the file.",
    421: "A foreign host.",
    422: "The request cannot be carried out; `code` and `hint` say why.",
    429: "Too many requests, or unfinished jobs, for one tenant; `Retry-After` says when to come back.",
    431: "Too many headers, or too long ones.",
    500: "The service failed.",
    503: "Not yet, or too busy: try again after `Retry-After`.",
    507: "The tenant's storage quota is used up, or no space is left.",
}

_PROBLEM_SCHEMA = f"#/components/schemas/{ProblemView.__name__}"

PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        # With "model" FastAPI would say that it is application/json.
        "content": {"application/problem+json": {"schema": {"$ref": _PROBLEM_SCHEMA}}},
    }
    for status, description in _STATUSES.items()
}

EDGE_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: PROBLEM_RESPONSES[status] for status in (400, 403, 414, 421, 431, 500, 503)
}
"""What any address may answer, because it is decided before the address is looked at."""
