"""Sample files that lie: arrays, the same as tensors, and pictures in class folders."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.hostile.pickles import LIVE
from tests.hostile_files import (
    Family,
    Field,
    HostileFile,
    entry,
    npy,
    npy_header,
    npz,
    pickled,
    safetensors_file,
    zip_of_zeros_deflated,
    zip_with_a_huge_directory,
)

PIXELS = npy(npy_header((4, 8, 8, 1)), bytes(256))
INVALID = frozenset({"invalid-samples"})
DAMAGED = frozenset({"damaged-file"})
IMAGES = frozenset({"invalid-images"})
LABELS = frozenset({"invalid-labels"})
OUT_OF_RANGE = frozenset({"images-out-of-range"})


def images(content: bytes) -> bytes:
    """Return an .npz whose images are *content*."""
    return npz({"images": content})


def tensors(*more: bytes, **entries: object) -> bytes:
    """Return a .safetensors of four images (1, 8, 8) with other *entries*, and bytes for them."""
    header = {"images": entry("U8", [4, 8, 8, 1], 0, 256)} | entries
    return safetensors_file(header, bytes(256) + b"".join(more))


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, pixels: bytes, *extra: bytes, depth: int = 8, colour: int = 0
) -> bytes:
    """Return a PNG put together by hand."""
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + body


def jpeg(width: int, height: int, *, marker: int = 0xC0, depth: int = 8) -> bytes:
    """Return the skeleton of a JPEG."""
    frame = struct.pack(">BBH", 0xFF, marker, 11) + struct.pack(">B2H", depth, height, width)
    frame += b"\x01\x01\x11\x00"
    return (
        b"\xff\xd8\xff\xfe\x00\x02"
        + frame
        + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x00\xff\xd9"
    )


def folders(picture: bytes, **others: bytes) -> bytes:
    """Return a zip of four class folders, all with the same picture, and other members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "abcd":
            archive.writestr(f"{name}/1.png", picture)
        for name, content in others.items():
            archive.writestr(name, content)
    return buffer.getvalue()


HONEST_PNG = png(8, 8, bytes(72))

ARRAYS: Mapping[str, tuple[Callable[[], bytes], frozenset[str]]] = {
    "nothing": (lambda: b"", frozenset({"empty-file"})),
    "an array without a zip": (lambda: PIXELS, INVALID),
    "an empty zip": (lambda: npz({}), INVALID),
    "no images": (lambda: npz({"labels": PIXELS}), INVALID),
    "no array": (lambda: images(b"hello"), INVALID),
    "a subarray": (lambda: images(npy(npy_header((4, 1, 1), ("|u1", (3,))), bytes(12))), INVALID),
    "a record": (lambda: images(npy(npy_header((4, 1, 1, 3), [("r", "|u1")]), bytes(12))), INVALID),
    "an array longer than its member": (
        lambda: images(npy(npy_header((9, 8, 8, 1)), bytes(256))), DAMAGED),
    "an array shorter than its member": (
        lambda: images(npy(npy_header((4, 8, 8, 1)), bytes(257))), DAMAGED),
    "exabytes": (lambda: images(npy(npy_header((1 << 40, 1 << 20, 1, 3)), bytes(12))), DAMAGED),
    "a product that wraps around": (
        lambda: images(npy(npy_header((1 << 32, 1 << 32, 1, 3)), bytes(12))), DAMAGED),
    "a negative shape": (lambda: images(npy(npy_header((-4, 8, 8, -1)), bytes(256))), INVALID),
    "a truth for a side": (lambda: images(npy(npy_header((True, 8, 8, 1)), bytes(64))), INVALID),
    "a number for a shape": (lambda: images(npy(npy_header(256), bytes(256))), INVALID),
    "a hundred dimensions": (lambda: images(npy(npy_header((1,) * 100), bytes(1))), INVALID),
    "a type of a gigabyte": (lambda: images(npy(npy_header((4, 1, 1, 1), "|S999999999"))),
                             frozenset({"damaged-file", "invalid-samples"})),
    "strings of no length": (
        lambda: images(npy(npy_header((1 << 40, 1, 1, 3), "|S0"))), IMAGES | INVALID),
    "code in the header": (lambda: images(npy("__import__('os').system('true')\n")), INVALID),
    "a sum in the header": (
        lambda: images(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2+2, 8, 8, 1)}\n",
                           bytes(256))), INVALID),
    "brackets nine hundred deep": (lambda: images(npy("(" * 900 + ")" * 900)), INVALID),
    "a minus nine thousand times": (lambda: images(npy("-" * 9000 + "1")), INVALID),
    "a header past the end": (lambda: images(b"\x93NUMPY\x01\x00\xff\xff{}"), INVALID),
    "a header of fifty megabytes": (
        lambda: images(b"\x93NUMPY\x02\x00\x00\x00\x00\x03{}"), INVALID),
    "a version of the future": (lambda: images(b"\x93NUMPY\x09\x09" + bytes(40)), INVALID),
    "a field twice": (
        lambda: images(npy("{'descr': '|u1', 'descr': '|O8', 'shape': (1, 1, 1, 1)}\n")), INVALID),
    "zeros by the hundred megabytes": (
        lambda: zip_of_zeros_deflated("images.npy", npy(npy_header((100 << 10, 32, 32, 1))), 100 << 20),
        frozenset({"too-large"})),
    "four gigabytes declared": (
        lambda: images(PIXELS).replace(
            struct.pack("<II", len(PIXELS), len(PIXELS)), b"\xf0\xff\xff\xff" * 2),
        frozenset({"unsafe-zip"})),
    "one name twice": (
        lambda: npz({"imaged": PIXELS, "images": PIXELS}).replace(b"imaged", b"images"),
        frozenset({"unsafe-zip"})),
    "compressed with lzma": (lambda: npz({"images": PIXELS}, compression=zipfile.ZIP_LZMA), INVALID),
    "a great many arrays": (lambda: npz({f"a{n}": PIXELS for n in range(100)}), INVALID),
    "a huge directory": (lambda: zip_with_a_huge_directory(30_000), frozenset({"unsafe-zip"})),
    "cut in the middle": (lambda: images(PIXELS)[:200], DAMAGED),
    "bytes after the end": (lambda: images(PIXELS) + b"more", frozenset({"unsafe-zip"})),
    "a NaN": (
        lambda: images(npy(npy_header((4, 1, 8, 8), "<f4"), struct.pack("<256f", *[float("nan")] * 256))),
        OUT_OF_RANGE),
}  # fmt: skip

IN_SAFETENSORS: Mapping[str, tuple[Callable[[], bytes], frozenset[str]]] = {
    "images of exabytes": (
        lambda: tensors(images=entry("U8", [1 << 60, 8, 8, 1], 0, 256)), DAMAGED),
    "images of a product that wraps around": (
        lambda: safetensors_file({"images": entry("F32", [1 << 32, 1 << 32, 1, 1], 0, 0)}), DAMAGED),
    "images that overflow before their 0": (
        lambda: safetensors_file({"images": entry("U8", [1 << 40, 1 << 40, 0, 1], 0, 0)}), DAMAGED),
    "a trillion images of no bytes": (
        lambda: safetensors_file({"images": entry("U8", [1 << 40, 0, 0, 0], 0, 0)}),
        frozenset({"too-large"})),
    "labels that overlap the images": (
        lambda: tensors(labels=entry("U8", [4], 252, 256)), DAMAGED),
    "labels that are the images": (
        lambda: tensors(labels=entry("U8", [4, 8, 8, 1], 0, 256)), DAMAGED),
    "labels behind a gap": (
        lambda: tensors(bytes(8), labels=entry("U8", [4], 260, 264)), DAMAGED),
    "labels past the end": (lambda: tensors(bytes(3), labels=entry("U8", [4], 256, 260)), DAMAGED),
    "a pickle behind the images": (lambda: tensors(b"cos\nsystem\n."), DAMAGED),
    "an .npz behind half a header": (lambda: safetensors_file(b"{", images(PIXELS)), DAMAGED),
    "an .npz behind the images": (lambda: tensors(images(PIXELS)), DAMAGED),
    "images by an alias too": (lambda: tensors(bytes(4), x=entry("U8", [4], 256, 260)), INVALID),
    "images by an escape too": (
        lambda: safetensors_file(
            b'{"images":{"dtype":"U8","shape":[4,8,8,1],"data_offsets":[0,256]},'
            b'"\\u0069mages":{"dtype":"U8","shape":[4,8,8,1],"data_offsets":[256,512]}}',
            bytes(512)), DAMAGED),
    "images in the metadata alone": (
        lambda: safetensors_file({"__metadata__": {"images": "[[[[0]]]]"}}), INVALID),
    "a thousand tensors and no images": (
        lambda: safetensors_file({f"{n:x}": entry("U8", [0], 0, 0) for n in range(1000)}), INVALID),
    "a name of half a surrogate pair beside": (
        lambda: tensors(bytes(1), **{"\ud800": entry("U8", [1], 256, 257)}), INVALID),
    "images of an unknown type": (
        lambda: tensors(images=entry("OBJ", [4, 8, 8, 1], 0, 256)), INVALID),
    "images of eight bits with a point": (
        lambda: tensors(images=entry("F8_E4M3", [4, 1, 8, 8], 0, 256)), IMAGES),
    "images whose sides are turned": (
        lambda: tensors(images=entry("U8", [8, 8, 4], 0, 256)), IMAGES),
    "a NaN in bfloat16": (
        lambda: safetensors_file({"images": entry("BF16", [4, 1, 8, 8], 0, 512)},
                                 bytes(510) + b"\xc0\x7f"), OUT_OF_RANGE),
    "the least below zero": (
        lambda: safetensors_file({"images": entry("F32", [4, 1, 8, 8], 0, 1024)},
                                 bytes(1020) + b"\x01\0\0\x80"), OUT_OF_RANGE),
    "a label above all integers": (
        lambda: tensors(b"\xff" * 32, labels=entry("U64", [4], 256, 288)), LABELS),
    "labels that are truths": (
        lambda: tensors(bytes(4), labels=entry("BOOL", [4], 256, 260)), LABELS),
    "one label for four images": (
        lambda: tensors(bytes(8), labels=entry("I64", [], 256, 264)), LABELS),
}  # fmt: skip

PICTURES: Mapping[str, tuple[Callable[[], bytes], frozenset[str]]] = {
    "a PNG of four gigapixels": (lambda: folders(png(65535, 65535, b"")), IMAGES),
    "a PNG that inflates to more": (lambda: folders(png(8, 8, bytes(20 << 20))), IMAGES),
    "a PNG that inflates to less": (lambda: folders(png(8, 8, bytes(71))), IMAGES),
    "a PNG of 16 bits": (lambda: folders(png(8, 8, bytes(136), depth=16)), IMAGES),
    "a PNG without its palette": (lambda: folders(png(8, 8, bytes(72), colour=3)), IMAGES),
    "a PNG that is transparent": (
        lambda: folders(png(8, 8, bytes(72), chunk(b"tRNS", b"\0\0"))), IMAGES),
    "a PNG with a wrong checksum": (lambda: folders(HONEST_PNG.replace(b"IDAT", b"IDAU")), IMAGES),
    "a PNG of a chunk of gigabytes": (
        lambda: folders(HONEST_PNG[:33] + b"\x7f\xff\xff\xffIDAT" + HONEST_PNG[41:]), IMAGES),
    "a PNG with a zip behind it": (lambda: folders(HONEST_PNG + images(PIXELS)), IMAGES),
    "a JPEG of four gigapixels": (lambda: folders(jpeg(65535, 65535)), IMAGES),
    "a JPEG of no height": (lambda: folders(jpeg(8, 0)), IMAGES),
    "a JPEG of 12 bits": (lambda: folders(jpeg(8, 8, depth=12)), IMAGES),
    "an arithmetic JPEG": (lambda: folders(jpeg(8, 8, marker=0xC9)), IMAGES),
    "a JPEG cut in the middle": (lambda: folders(jpeg(8, 8)[:-2]), IMAGES),
    "a GIF under another name": (lambda: folders(b"GIF89a" + bytes(40)), IMAGES),
    "a drawing that loads a page": (
        lambda: folders(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), IMAGES),
    "an image in no folder": (lambda: folders(HONEST_PNG, **{"2.png": HONEST_PNG}), INVALID),
    "a folder too deep": (lambda: folders(HONEST_PNG, **{"a/b/c/d.png": HONEST_PNG}), INVALID),
    "a path upwards": (
        lambda: folders(HONEST_PNG, **{"../e/1.png": HONEST_PNG}), frozenset({"unsafe-zip"})),
    "classes that are deep": (
        lambda: folders(HONEST_PNG, **{"classes.json": b"[" * 100_000}), LABELS),
    "classes outside the model's": (
        lambda: folders(HONEST_PNG, **{"classes.json": b'{"a":0,"b":1,"c":2,"d":4000}'}),
        frozenset({"class-count-mismatch"})),
    "pictures of two sizes": (
        lambda: folders(HONEST_PNG, **{"e/1.png": png(9, 8, bytes(80))}), IMAGES),
}  # fmt: skip


def object_array(canary: Path) -> bytes:
    """Put a pickle that runs where an array's objects are."""
    return images(npy(npy_header((4, 8, 8, 1), "|O"), pickled(LIVE["exec"](canary))))


def object_labels(canary: Path) -> bytes:
    """Do the same in the labels, beside honest images."""
    labels = npy(npy_header((4,), "|O"), pickled(LIVE["exec"](canary)))
    return npz({"images": PIXELS, "labels": labels})


def pickle_for_an_array(canary: Path) -> bytes:
    """Put a bare pickle where an array is expected: numpy itself would fall back to it."""
    return images(pickled(LIVE["exec"](canary)))


def bare_pickle(canary: Path) -> bytes:
    """Send a pickle for a sample file."""
    return pickled(LIVE["exec"](canary))


def files() -> list[HostileFile]:
    """Return arrays and pictures, by turns as samples and as evaluation."""
    tables = (
        (Family.NUMPY, ".npz", ARRAYS),
        (Family.SAFETENSORS, ".safetensors", IN_SAFETENSORS),
        (Family.IMAGES, ".zip", PICTURES),
    )
    found = [
        HostileFile(
            name=name,
            family=family,
            build=lambda _, build=build: build(),  # type: ignore[misc]
            suffix=suffix,
            field=Field.EVALUATION if place % 3 == 2 else Field.SAMPLES,
            codes=codes,
        )
        for family, suffix, table in tables
        for place, (name, (build, codes)) in enumerate(table.items())
    ]
    found += [
        HostileFile(
            name=name,
            family=Family.CODE,
            build=build,
            suffix=".npz",
            field=field,
            carries_code=True,
            codes=INVALID,
        )
        for name, field, build in (
            ("objects for images", Field.SAMPLES, object_array),
            ("objects for labels", Field.EVALUATION, object_labels),
            ("a pickle for an array", Field.SAMPLES, pickle_for_an_array),
            ("a pickle for an .npz", Field.EVALUATION, bare_pickle),
        )
    ]
    return found
