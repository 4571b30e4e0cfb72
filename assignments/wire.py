"""Calls between the grader's process and the student's, over a socket: plain data both ways.

Nothing is ever unpickled. The grader runs the tests, and there the functions of the set are
stand-ins that ask the student's process. Functions of other sets are stand-ins in the student's
process that ask the grader's: no earlier mistake costs points, and no answer has to be there.

A message is a header in JSON and the bytes of the tensors' storages. A storage that came with a
call goes back into that very storage, so that memory which is shared, or changed in place, is so on
both sides. A call whose tensors require gradients can be asked for them later ("backward").
"""

import builtins
import functools
import json
import math
import struct
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

MOST_BYTES = 1 << 25  # of a message
MOST_ELEMENTS = 10**7  # of a tensor, however little memory it claims
RECORDS = (
    "tree.Tree",
    "medusa.Sampling",
    "medusa.Step",
    "medusa.MedusaConfig",
    "model.ModelConfig",
)
CACHE, HEADS = "model.KVCache", "medusa.MedusaHeads"
HEADS_PARTS = "config", "weight", "bias", "lm_heads", "token_map"


class Gone(BaseException):
    """The other process has ended or no longer makes sense.

    No test, and no student's `except Exception`, can pass over it.
    """


def loaded(name: str):
    """The class module.Class of a module that is imported already; None if it is not."""
    module, _, attribute = name.partition(".")
    return getattr(sys.modules.get(module), attribute, None)


def record_name(value) -> str | None:
    return next((name for name in RECORDS if type(value) is loaded(name)), None)


# ---- values as JSON and storages ----


def linear(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = weight
    return layer


class ByValue:
    """`self` of a method of MedusaHeads, which crosses with its weights."""

    def __init__(self, heads):
        self.heads = heads


class Encoder:
    """known: storages that came with the call which is answered here, by their address."""

    def __init__(self, peer: "Peer", known: dict[int, int] | None = None):
        self.peer, self.known = peer, known or {}
        self.storages, self.index, self.tracked = [], {}, []

    def encode(self, value):
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            return self.tensor(value)
        record = record_name(value)
        if record is not None:
            parts = {f.name: self.encode(getattr(value, f.name)) for f in fields(value)}
            return {"record": record, "fields": parts}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.encode(part) for part in value]}
        if isinstance(value, dict):
            kind = "counter" if isinstance(value, Counter) else "dict"
            return {kind: [[self.encode(key), self.encode(part)] for key, part in value.items()]}
        if isinstance(value, nn.Linear):
            return {"linear": self.encode(value.weight)}
        if isinstance(value, torch.Generator):
            return {"generator": self.encode(value.get_state())}
        if isinstance(value, ByValue):
            return self.heads(value.heads)
        if type(value) is loaded(CACHE):
            return {"cache": {name: self.encode(part) for name, part in vars(value).items()}}
        if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:  # a number of numpy's
            return value.item()
        return self.peer.encode_object(value, self)

    def tensor(self, value: Tensor) -> dict:
        storage = value.untyped_storage()
        address = storage.data_ptr()
        if address == 0 or address not in self.index:
            self.index[address] = len(self.storages)
            self.storages.append(storage)
        if value.requires_grad:
            self.tracked.append(value)
        return {
            "tensor": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "stride": list(value.stride()),
            "offset": value.storage_offset(),
            "storage": self.index[address],
            "grad": value.requires_grad,
            "parameter": isinstance(value, nn.Parameter),
        }

    def heads(self, value) -> dict:
        """A MedusaHeads as it is, with whatever parameters it should not have."""
        parts = {name: getattr(value, name) for name in HEADS_PARTS if hasattr(value, name)}
        more = {n.replace(".", "_"): w for n, w in value.named_parameters() if n not in parts}
        parts |= more
        return {"heads": {name: self.encode(part) for name, part in parts.items()}}

    def message(self, header: dict) -> bytes:
        blobs = [
            bytes(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes())
            for storage in self.storages
        ]
        origins = [self.known.get(storage.data_ptr()) for storage in self.storages]
        header["storages"] = [[len(blob), origin] for blob, origin in zip(blobs, origins)]
        text = json.dumps(header).encode()
        return struct.pack("<II", len(text), sum(map(len, blobs))) + text + b"".join(blobs)


class Decoder:
    """known: the storages that went out with the call whose answer this is.

    writable: the addresses of those that the call may change.
    """

    def __init__(self, peer: "Peer", storages, blob, known=(), writable=frozenset()):
        self.peer, self.storages, self.tracked = peer, [], []
        for size, origin in storages:
            part, blob = bytearray(blob[:size]), blob[size:]
            storage = torch.UntypedStorage(0)
            if part:
                storage = torch.frombuffer(part, dtype=torch.uint8).untyped_storage()
            if origin is not None and known[origin].nbytes() == size:
                if known[origin].data_ptr() in writable:
                    known[origin].copy_(storage)
                storage = known[origin]
            self.storages.append(storage)

    def decode(self, value):
        if not isinstance(value, dict):
            return value
        kind = next(iter(value))
        content = value[kind]
        if kind in ("list", "tuple", "iterator"):
            parts = [self.decode(part) for part in content]
            return {"list": list, "tuple": tuple, "iterator": iter}[kind](parts)
        if kind in ("dict", "counter"):
            parts = {self.decode(key): self.decode(part) for key, part in content}
            return Counter(parts) if kind == "counter" else parts
        if kind == "record" and content in RECORDS:
            parts = {name: self.decode(part) for name, part in value["fields"].items()}
            return loaded(content)(**parts)
        if kind == "generator":
            generator = torch.Generator()
            generator.set_state(self.decode(content))
            return generator
        if kind in ("tensor", "linear", "cache", "heads"):
            return getattr(self, kind)(value)
        return self.peer.decode_object(value, self)

    def tensor(self, value: dict) -> Tensor:
        dtype, storage = getattr(torch, value["tensor"]), self.storages[value["storage"]]
        shape, stride, offset = value["shape"], value["stride"], value["offset"]
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
        end = 0 if 0 in shape else last + 1
        outside = min([offset, *shape, *stride]) < 0 or end * dtype.itemsize > storage.nbytes()
        if outside or math.prod(shape) > MOST_ELEMENTS:
            raise ValueError("a tensor that lies outside of its memory")
        tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
        if value["parameter"]:
            tensor = nn.Parameter(tensor, requires_grad=value["grad"])
        if value["grad"]:
            self.tracked.append(tensor)
        return tensor

    def linear(self, value: dict) -> nn.Linear:
        return linear(self.decode(value["linear"]))

    def cache(self, value: dict):
        cache = loaded(CACHE).__new__(loaded(CACHE))
        vars(cache).update({name: self.decode(part) for name, part in value["cache"].items()})
        return cache

    def heads(self, value: dict):
        heads = loaded(HEADS).__new__(loaded(HEADS))
        nn.Module.__init__(heads)
        parts = {name: self.decode(part) for name, part in value["heads"].items()}
        heads.register_buffer("token_map", parts.pop("token_map", None))
        heads.token_weights = None  # no set is about sequential heads
        for name, part in parts.items():
            setattr(heads, name, part)
        return heads


# ---- calls ----


class Tracked(torch.autograd.Function):
    """A call whose result has gradients: they are asked for where it was computed."""

    @staticmethod
    def forward(ctx, peer, exchange, box, *tensors):
        box.append(exchange())
        ctx.peer, ctx.id = peer, box[0]["id"]
        return tuple(box[0]["decoder"].tracked)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *ctx.peer.call("backward", ctx.id, list(grads))


class Peer:
    """One end. resolve(name): the function that the other end may call by this name."""

    def __init__(self, sock, resolve):
        self.sock, self.resolve, self.graphs = sock, resolve, []

    def encode_object(self, value, encoder: Encoder):
        name = f"{type(value).__module__}.{type(value).__name__}"
        raise TypeError(f"a {name} was returned: return numbers, lists, tuples or torch tensors")

    def decode_object(self, value: dict, decoder: Decoder):
        raise ValueError("a value of no kind that is known here")

    # -- the socket

    def send(self, encoder: Encoder, **header) -> None:
        message = encoder.message(header)
        if len(message) > MOST_BYTES:
            raise ValueError(f"{len(message)} bytes are more than a call may carry")
        try:
            self.sock.sendall(message)
        except OSError:
            raise Gone from None

    def read(self, n: int) -> bytearray:
        data = bytearray()
        while len(data) < n:
            try:
                part = self.sock.recv(min(n - len(data), 1 << 20))
            except OSError:
                part = b""
            if not part:
                raise Gone
            data += part
        return data

    def receive(self) -> tuple[dict, memoryview]:
        size, more = struct.unpack("<II", self.read(8))
        if size + more > MOST_BYTES:
            raise Gone
        header = json.loads(bytes(self.read(size)))
        return header, memoryview(self.read(more))

    # -- asking

    def asked(self, args, kwargs) -> tuple[Encoder, dict]:
        encoder = Encoder(self)
        named = {key: encoder.encode(value) for key, value in kwargs.items()}
        return encoder, {"args": encoder.encode(args), "kwargs": named}

    def call(self, name: str, *args, **kwargs):
        encoder, asked = self.asked(args, kwargs)
        track = bool(encoder.tracked) and torch.is_grad_enabled()

        def exchange() -> dict:
            self.send(encoder, kind="call", name=name, track=track, **asked)
            return self.answer(encoder.storages, mutable(args, kwargs))

        if not track:
            return exchange()["value"]
        box = []
        outputs = iter(Tracked.apply(self, exchange, box, *encoder.tracked))
        value, tracked = box[0]["value"], {id(tensor) for tensor in box[0]["decoder"].tracked}
        parts = [
            next(outputs) if id(part) in tracked else part
            for part in (value if isinstance(value, tuple) else [value])
        ]
        return tuple(parts) if isinstance(value, tuple) else parts[0]

    def stream(self, name: str, *args, **kwargs):
        """The same for a function that yields."""
        encoder, asked = self.asked(args, kwargs)
        self.send(encoder, kind="call", name=name, track=False, **asked)
        while True:
            answer = self.answer(encoder.storages, mutable(args, kwargs))
            if answer["kind"] != "yield":
                break
            yield answer["value"]
            self.send(Encoder(self), kind="next")
        yield from answer["value"] or ()

    def answer(self, storages: list, arguments: list) -> dict:
        """Wait for the answer, answering what the other end asks in between."""
        while True:
            header, blob = self.receive()
            if header["kind"] == "call":
                self.serve(header, blob)
                continue
            caches = [argument for argument in arguments if type(argument) is loaded(CACHE)]
            writable = {cache.data.untyped_storage().data_ptr() for cache in caches}
            decoder = Decoder(self, header["storages"], blob, storages, writable)
            if header["kind"] == "raise":
                raise rebuilt(header)
            for argument, state in zip(arguments, header.get("state", ())):
                restore(argument, decoder.decode(state))
            value = decoder.decode(header.get("value"))
            return {
                "kind": header["kind"], "value": value, "id": header.get("id"), "decoder": decoder
            }  # fmt: skip

    # -- answering

    def serve(self, header: dict, blob: memoryview) -> None:
        try:
            name = header["name"]
            function = self.backward if name == "backward" else self.resolve(name)
            decoder = Decoder(self, header["storages"], blob)
            args = decoder.decode(header["args"])
            kwargs = {key: decoder.decode(value) for key, value in header["kwargs"].items()}
            leaves = [tensor.requires_grad_(header["track"]) for tensor in decoder.tracked]
            storages = enumerate(decoder.storages)
            known = {storage.data_ptr(): i for i, storage in storages if storage.nbytes()}
            with torch.set_grad_enabled(header["track"]):
                value = function(*args, **kwargs)
            changed = mutable(args, kwargs)
            if isinstance(value, Iterator):
                for item in value:
                    self.reply(known, "yield", item, changed)
                    self.answer([], [])  # "next"
                value = None
            self.reply(known, "return", value, changed, leaves if header["track"] else None)
        except Gone:
            raise
        except BaseException as error:
            about = {"type": type(error).__name__, "text": str(error), "where": self.where(error)}
            self.send(Encoder(self), kind="raise", **about)

    def reply(self, known: dict, kind: str, value, changed: list, leaves=None) -> None:
        encoder = Encoder(self, known)
        header = {"kind": kind, "value": encoder.encode(value)}
        if leaves is not None:
            self.graphs.append((leaves, list(encoder.tracked)))
            header["id"] = len(self.graphs) - 1
        header["state"] = [encoder.encode(argument) for argument in changed]
        self.send(encoder, **header)

    def backward(self, number: int, grads: list) -> list:
        leaves, outputs = self.graphs[number]
        with torch.enable_grad():
            return list(
                torch.autograd.grad(outputs, leaves, grads, allow_unused=True, retain_graph=True)
            )

    def where(self, error: BaseException) -> str:
        return ""


def mutable(args: tuple, kwargs: dict) -> list:
    """The arguments that a call may change in place: caches and random generators."""
    kinds = loaded(CACHE), torch.Generator
    return [value for value in (*args, *kwargs.values()) if type(value) in kinds]


def restore(argument, state) -> None:
    """Bring an argument into the state that the call left it in."""
    if isinstance(argument, torch.Generator):
        argument.set_state(state.get_state())
    else:
        argument.data, argument.length = state.data, state.length


def rebuilt(header: dict) -> Exception:
    """What was raised at the other end, if Python has it by this name; only its text crosses."""
    name, text = str(header["type"]), str(header["text"])
    kind, error = getattr(builtins, name, None), RuntimeError(f"{name}: {text}")
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(TypeError):
            error = kind(text)
    if header["where"]:
        error.add_note(str(header["where"]))
    return error


class Student(Peer):
    """The end in the student's process. Models and heads stay with the grader: here is `Remote`."""

    def __init__(self, sock, resolve, folder: Path):
        super().__init__(sock, resolve)
        self.folder = folder

    def decode_object(self, value: dict, decoder: Decoder):
        parts = {name: decoder.decode(part) for name, part in value["parts"].items()}
        return Remote(self, value["remote"], **parts)

    def encode_object(self, value, encoder: Encoder):
        if type(value) is loaded(HEADS):
            return encoder.heads(value)
        if isinstance(value, Remote):
            return {"remote": value.name}
        return super().encode_object(value, encoder)

    def where(self, error: BaseException) -> str:
        """The last place in the student's own files."""
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            path = Path(frame.filename)
            if path.parent == self.folder:
                return f"in {path.name}, line {frame.lineno}, {frame.name}"
        return ""


class Remote:
    """A model or heads that live in the grader's process."""

    def __init__(self, peer: Peer, name: str, **parts):
        self.peer, self.name = peer, name
        vars(self).update(parts)

    def __call__(self, *args, **kwargs):
        return self.peer.call(self.name, *args, **kwargs)

    forward = __call__

    def truncated(self, lm_head):
        if self.token_map is None:
            return lm_head
        return linear(nn.Parameter(lm_head.weight[self.token_map], requires_grad=False))

    def new_cache(self, capacity: int, batch: int = 1):
        weight = self.lm_head.weight
        return loaded(CACHE)(self.config, batch, capacity, weight.dtype, weight.device)


class Grader(Peer):
    """The end in the grader's process: it hands out models and heads by name, and answers calls."""

    def __init__(self, sock, functions: dict):
        super().__init__(sock, self.named)
        self.functions, self.objects = functions, []

    def named(self, name: str):
        return self.objects[int(name[1:])] if name.startswith("#") else self.functions[name]

    def encode_object(self, value, encoder: Encoder):
        if isinstance(value, Iterator):
            return {"iterator": [encoder.encode(v) for v in value]}
        if not callable(value):
            return super().encode_object(value, encoder)
        if value not in self.objects:
            self.objects.append(value)
        names = [name for name in ("config", "lm_head", "token_map") if hasattr(value, name)]
        parts = {name: encoder.encode(getattr(value, name)) for name in names}
        return {"remote": f"#{self.objects.index(value)}", "parts": parts}

    def decode_object(self, value: dict, decoder: Decoder):
        if "remote" in value:
            return self.named(str(value["remote"]))
        return super().decode_object(value, decoder)


# ---- stand-ins ----

PROPERTIES = functools.cached_property, property


def owner_of(name: str):
    """module.Class.function -> (the class or module that holds it, its name there)."""
    module, *path = name.split(".")
    owner = sys.modules[module]
    for part in path[:-1]:
        owner = getattr(owner, part)
    return owner, path[-1]


def function_of(name: str):
    """The function itself, whatever property it is wrapped in; a class for its __init__."""
    owner, attribute = owner_of(name)
    if attribute == "__init__":
        return owner
    value = vars(owner)[attribute]
    if isinstance(value, PROPERTIES):
        return getattr(value, "func", getattr(value, "fget", value))
    return value


def stand_in(name: str, connection) -> None:
    """Put a function in place that asks the other end; connection() is the Peer to ask."""
    owner, attribute = owner_of(name)

    def call(*args, **kwargs):
        if attribute == "forward":
            args = [ByValue(arg) if type(arg) is loaded(HEADS) else arg for arg in args]
        return connection().call(name, *args, **kwargs)

    def stream(*args, **kwargs):
        yield from connection().stream(name, *args, **kwargs)

    def initialise(self, *args, **kwargs):
        nn.Module.__init__(self)
        with torch.no_grad():
            vars(self).update(vars(connection().call(name, *args, **kwargs)))

    if isinstance(vars(owner).get(attribute), PROPERTIES):
        value = functools.cached_property(call)
        value.__set_name__(owner, attribute)
    else:
        value = {"__init__": initialise, "medusa_generate": stream}.get(attribute, call)
        value.__name__ = attribute  # the name of a test's case
    setattr(owner, attribute, value)
