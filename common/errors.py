"""
Everything that can go wrong and that a client is told of.

``Problem``
├── ``Refused``  your request or your file: change it, then send it again
├── ``NotYet``   nothing is wrong: wait, then ask again
└── ``Fault``    our side failed: the only kind that is logged as an error

Each class has a stable ``code``; its docstring is the default message and ``hint`` names the fix. The
worker stores the same objects in ``job.error``, so a client reads one language on both paths. HTTP
statuses are the service's business (``service/app.py``).
"""

import inspect
from typing import Any, ClassVar

MAX_DETAIL_LENGTH = 2000
"""Length of a detail: it may quote names from a hostile file, and is kept with the job."""


class Problem(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "problem"
    title: ClassVar[str] = "Something went wrong"
    default_hint: ClassVar[str] = ""

    def __init__(self, detail: str | None = None, *, hint: str | None = None) -> None:
        told = (detail or inspect.getdoc(type(self)) or self.title)[:MAX_DETAIL_LENGTH]
        self.detail = "".join(_shown(character) for character in told)
        self.hint = self.default_hint if hint is None else hint
        super().__init__(self.detail)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``job.error`` holds of this problem."""
        return {
            "code": self.code,
            "title": self.title,
            "detail": self.detail,
            "hint": self.hint,
        }


def _shown(character: str) -> str:
    """Escape what could not be stored, sent or shown: NUL, half a surrogate pair, turned writing."""
    return character if character.isprintable() or character == "\n" else ascii(character)[1:-1]


class Refused(Problem):
    """The request cannot be carried out as it is."""

    code = "refused"
    title = "Request refused"
    default_hint = "Compare the request with its description in /openapi.json."


class NotYet(Problem):
    """The answer is not there yet."""

    code = "not-yet"
    title = "Not yet"
    default_hint = "Ask again after the seconds that Retry-After gives, or wait with ?wait=50."

    def __init__(
        self,
        detail: str | None = None,
        *,
        hint: str | None = None,
        retry_after_seconds: int = 2,
    ) -> None:
        super().__init__(detail, hint=hint)
        self.retry_after_seconds = retry_after_seconds


class Fault(Problem):
    """Our side failed."""

    code = "fault"
    title = "Internal error"
    default_hint = "Send the job again; if it fails again, report the request id."


# The request -------------------------------------------------------------------------------------


class Unauthorised(Refused):
    """This needs a bearer token that is known, unexpired and not revoked."""

    code = "unauthorised"
    title = "Token missing or not valid"
    default_hint = (
        "Send 'Authorization: Bearer ww_…'; an operator makes one with "
        "'python -m service tokens create NAME'."
    )


class InsufficientScope(Refused):
    """This token may not do this: it lacks a scope."""

    code = "insufficient-scope"
    title = "Scope missing"
    default_hint = (
        "Use a token with the scope that the detail names; an operator makes one with "
        "'python -m service tokens create NAME --scope SCOPE'."
    )

    def __init__(
        self, detail: str | None = None, *, hint: str | None = None, scope: str = ""
    ) -> None:
        super().__init__(detail, hint=hint)
        self.scope = scope


class HostNotAllowed(Refused):
    """Without tokens only 127.0.0.1, localhost and [::1] are served."""

    code = "host-not-allowed"
    title = "Host not allowed"
    default_hint = "Call the service by its loopback name, or run it with WEIGHTWASH_AUTH=tokens."


class OriginNotAllowed(Refused):
    """A web page of another origin may not call this service."""

    code = "origin-not-allowed"
    title = "Origin not allowed"
    default_hint = "Call the service from a program, or from a page that it serves itself."


class NotFound(Refused):
    """There is nothing under this address."""

    code = "not-found"
    title = "Not found"
    default_hint = "Check the id; jobs of another tenant cannot be seen."


class MethodNotAllowed(Refused):
    """This address does not know this verb."""

    code = "method-not-allowed"
    title = "Method not allowed"
    default_hint = "The Allow header lists the verbs; /openapi.json describes them."


class MalformedRequest(Refused):
    """The request is not HTTP, or could be read in two ways."""

    code = "malformed-request"
    title = "Malformed request"
    default_hint = "Send one request line, and each header once, as an HTTP library does."


class TargetTooLong(Refused):
    """The address is longer than this service reads."""

    code = "target-too-long"
    title = "Address too long"
    default_hint = "Use an address that the service gave; long values go into the form."


class HeadTooLarge(Refused):
    """The request has more headers, or longer ones, than this service reads."""

    code = "head-too-large"
    title = "Headers too large"
    default_hint = "Send fewer or shorter headers; cookies are not needed."


class TooSlow(Refused):
    """The request came too slowly."""

    code = "too-slow"
    title = "Too slow"
    default_hint = "Send it again over a faster connection, or ask the operator to lower the limit."


class NotMultipart(Refused):
    """The body is not a complete multipart/form-data form."""

    code = "not-multipart"
    title = "Not a multipart form"
    default_hint = "Send the fields with 'curl -F model=@model.pt -F samples=@clean.npz'."


class MissingField(Refused):
    """A required field is missing."""

    code = "missing-field"
    title = "Field missing"
    default_hint = "Send both files: -F model=@model.pt -F samples=@clean.npz."


class UnknownField(Refused):
    """The form holds a field that this service does not know."""

    code = "unknown-field"
    title = "Unknown field"
    default_hint = "Compare the field's name with the list in /openapi.json."


class InvalidField(Refused):
    """A field's value is not of the type it must have."""

    code = "invalid-field"
    title = "Invalid field"
    default_hint = "Compare the field with its description in /openapi.json."


class TooLarge(Refused):
    """The upload is larger than this service takes."""

    code = "too-large"
    title = "Too large"
    default_hint = "Send a smaller file, or ask the operator to raise the limit."


class QuotaExceeded(Refused):
    """This tenant has as many unfinished jobs as it may have."""

    code = "quota-exceeded"
    title = "Too many unfinished jobs"
    default_hint = "Wait until a job ends, or cancel one."


class InsufficientStorage(Refused):
    """This tenant's stored files take up as much as they may."""

    code = "insufficient-storage"
    title = "Storage quota used up"
    default_hint = (
        "Delete jobs whose files are no longer needed (DELETE /jobs/{id}, scope admin, within seconds), "
        "wait until some expire, or ask the operator to raise WEIGHTWASH_MAX_STORED_BYTES."
    )


class TooManyRequests(NotYet):
    """This tenant has made as many requests as it may for now."""

    code = "too-many-requests"
    title = "Too many requests"
    default_hint = (
        "Wait for the seconds that Retry-After gives; one GET with ?wait=50 replaces many polls."
    )


class IdempotencyMismatch(Refused):
    """This Idempotency-Key was used with another payload."""

    code = "idempotency-mismatch"
    title = "Idempotency-Key used before"
    default_hint = "Use a new key for a new payload."


class NoModel(Refused):
    """This job ended without a model."""

    code = "no-model"
    title = "The job has no model"
    default_hint = "Read 'error' in the job; a failed or cancelled job has nothing to download."


class NoSuchCandidate(Refused):
    """This job has no such candidate."""

    code = "no-such-candidate"
    title = "No such candidate"
    default_hint = (
        "The report lists the candidates under evidence.candidates, counted from 0; without "
        "?candidate= the chosen one is sent."
    )


class NoSuchTrigger(Refused):
    """This job has no such trigger."""

    code = "no-such-trigger"
    title = "No such trigger"
    default_hint = (
        "The report lists the recovered triggers under evidence.triggers, counted from 0."
    )


class NoReport(Refused):
    """This job ended without a report."""

    code = "no-report"
    title = "The job has no report"
    default_hint = "Read 'error' in the job."


class Expired(Refused):
    """The job's files were deleted."""

    code = "expired"
    title = "No longer kept"
    default_hint = "Send the job again, and download within the time that 'expires_at' gives."


class AlreadyEnded(Refused):
    """The job has ended, so there is nothing to cancel."""

    code = "already-ended"
    title = "The job has ended"
    default_hint = "Read the job's state; terminal states are final."


class RangeNotSatisfiable(Refused):
    """The requested range lies outside the file."""

    code = "range-not-satisfiable"
    title = "Range not satisfiable"
    default_hint = "Ask for a range within the length that Content-Range gives."


# What is asked for -------------------------------------------------------------------------------


class UnknownMethod(Refused):
    """There is no such purification method."""

    code = "unknown-method"
    title = "Unknown method"
    default_hint = "GET /methods lists them."


class UnknownParameter(Refused):
    """The method has no such parameter."""

    code = "unknown-parameter"
    title = "Unknown parameter"
    default_hint = "GET /methods lists each method's parameters."


class InvalidParameter(Refused):
    """A parameter is of the wrong type or outside its bounds."""

    code = "invalid-parameter"
    title = "Invalid parameter"
    default_hint = "GET /methods lists each parameter's type and bounds."


class NothingToMask(Refused):
    """The model has no weight that the method could mask."""

    code = "nothing-to-mask"
    title = "Nothing to mask"
    default_hint = (
        'Send params={"mask_linear": true} with awm, or choose a method that changes all weights, '
        "such as ibau."
    )


class NothingLearned(Refused):
    """The samples gave the method nothing to learn from, so that it would erase the whole model."""

    code = "nothing-learned"
    title = "Nothing learned"
    default_hint = "Send varied images of several classes, with their labels."


class TooFewSamples(Refused):
    """The method needs more samples than there are."""

    code = "too-few-samples"
    title = "Too few samples"
    default_hint = "Send more clean samples, or set the parameter that the detail names."


class UnknownArchitecture(Refused):
    """There is no such architecture."""

    code = "unknown-architecture"
    title = "Unknown architecture"
    default_hint = "GET /architectures lists them."


class ArchitectureNeeded(Refused):
    """The state dict does not tell one architecture."""

    code = "architecture-needed"
    title = "Architecture needed"
    default_hint = "Name it: -F architecture=resnet18_cifar. GET /architectures lists them."


class ArchitectureMismatch(Refused):
    """The state dict does not fit the architecture."""

    code = "architecture-mismatch"
    title = "State dict does not fit"
    default_hint = "Name the architecture the weights were trained in, with its architecture_args."


# The model file ----------------------------------------------------------------------------------


class EmptyFile(Refused):
    """The file is empty."""

    code = "empty-file"
    title = "Empty file"
    default_hint = "Check that the file was written before it was sent."


class UnsupportedFormat(Refused):
    """The file is of no format that this service takes."""

    code = "unsupported-format"
    title = "Unsupported format"
    default_hint = (
        "Send a state dict as .pt, .pth or .safetensors: "
        'torch.save(model.state_dict(), "model.pt"), run where the model was built.'
    )


class PickledModule(Refused):
    """The file holds a whole pickled module, which runs code when it is loaded."""

    code = "pickled-module"
    title = "Not a state dict"
    default_hint = (
        "Export the weights alone, where the model was built: "
        'torch.save(model.state_dict(), "model.pt")'
    )


class UnsafePickle(Refused):
    """The file's pickle names code that no state dict needs."""

    code = "unsafe-pickle"
    title = "Pickle refused"
    default_hint = (
        "Save tensors and plain values only, where the model was built: "
        'torch.save(model.state_dict(), "model.pt")'
    )


class DamagedFile(Refused):
    """The file is truncated or damaged."""

    code = "damaged-file"
    title = "Damaged file"
    default_hint = "Compare its size and sha256 with the original, then send it again."


class UnsafeZip(Refused):
    """The file is a zip that can be read in more than one way."""

    code = "unsafe-zip"
    title = "Zip refused"
    default_hint = (
        "Write it again in one go, with torch.save, np.savez or zip -r, and change nothing in it "
        "afterwards."
    )


class NoStateDict(Refused):
    """The file holds no state dict."""

    code = "no-state-dict"
    title = "No state dict"
    default_hint = (
        "Put it at the top level, or under one of: state_dict, net, model, model_state_dict."
    )


class WeightsNotFinite(Refused):
    """A weight is NaN or infinite."""

    code = "weights-not-finite"
    title = "Weights are not finite"
    default_hint = "Send a checkpoint from before the training diverged."


# The samples -------------------------------------------------------------------------------------


class InvalidSamples(Refused):
    """The file is not a sample file."""

    code = "invalid-samples"
    title = "Invalid sample file"
    default_hint = (
        "Send an .npz: np.savez('clean.npz', images=images, labels=labels); or a .safetensors: "
        'save_file({"images": images, "labels": labels}, "clean.safetensors"); or a zip with one folder '
        "of PNG or JPEG per class."
    )


class NoSamples(Refused):
    """The sample file holds no image."""

    code = "no-samples"
    title = "No samples"
    default_hint = "Send at least one clean image per class."


class InvalidImages(Refused):
    """The images are of the wrong type or shape."""

    code = "invalid-images"
    title = "Invalid images"
    default_hint = (
        "Images are uint8 (N, H, W, C), or float32 (N, C, H, W) in [0, 1]; "
        "uint8 (N, C, H, W) becomes the second by images / 255."
    )


class ImagesOutOfRange(Refused):
    """A float image has a value outside [0, 1]."""

    code = "images-out-of-range"
    title = "Images out of range"
    default_hint = "Send images before normalisation, in [0, 1], and give mean and std as fields."


class InvalidLabels(Refused):
    """The labels are of the wrong type or number."""

    code = "invalid-labels"
    title = "Invalid labels"
    default_hint = "Labels are one whole number per image, from 0 to classes - 1."


class ClassCountMismatch(Refused):
    """A label is not one of the model's classes."""

    code = "class-count-mismatch"
    title = "Label outside the model's classes"
    default_hint = "Number the classes as the model's head does, from 0."


class TooSlowToRead(Refused):
    """The files took longer to read than honest ones do."""

    code = "too-slow-to-read"
    title = "Too slow to read"
    default_hint = "Send fewer or smaller images, or a smaller model."


# Our side ----------------------------------------------------------------------------------------


class StillRunning(NotYet):
    """The job has not ended."""

    code = "still-running"
    title = "The job has not ended"
    default_hint = "Ask again after Retry-After (curl --retry does), or GET the job with ?wait=50."


class Busy(NotYet):
    """The service is at the limit of what it takes at once."""

    code = "busy"
    title = "Busy"
    default_hint = "Send the request again after the seconds that Retry-After gives."


class NoSpace(Fault):
    """There is no space left to store this."""

    code = "no-space"
    title = "No space left"
    default_hint = "Try again later; the operator has to free space in the data folder."


class Unavailable(Fault):
    """A part that this needs does not answer."""

    code = "unavailable"
    title = "Not available"
    default_hint = "Try again in a moment; GET /readyz says which part is missing."


class InternalError(Fault):
    """The service failed to answer."""

    code = "internal-error"
    title = "Internal error"


class WorkerLost(Fault):
    """Every worker that took this job stopped before it ended."""

    code = "worker-lost"
    title = "Worker lost"


class JobCrashed(Fault):
    """The job's process died."""

    code = "job-crashed"
    title = "The job crashed"


class OutOfMemory(Fault):
    """The job needs more memory than its device has."""

    code = "out-of-memory"
    title = "Out of memory"
    default_hint = "Use a smaller batch_size, or fewer evaluation images."


class TimeLimitExceeded(Fault):
    """The job took longer than it may."""

    code = "time-limit-exceeded"
    title = "Time limit exceeded"
    default_hint = "Use fewer epochs or samples, or ask the operator to raise the limit."


class DeadlinePassed(Refused):
    """The job did not end within its cancel_after."""

    code = "deadline-passed"
    title = "Deadline passed"
    default_hint = "Send the job again with a longer cancel_after."


class CancelledByClient(Refused):
    """The job was cancelled."""

    code = "cancelled"
    title = "Cancelled"
    default_hint = "Send the job again if you still need it."


def _tree(root: type[Problem]) -> dict[str, type[Problem]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


PROBLEMS = _tree(Problem)
"""Every problem by its code: how an error that crossed a process comes back as its class."""
