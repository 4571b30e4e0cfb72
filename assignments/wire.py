"""Calls between the grader's process and the student's, over a socket: plain data both ways, nothing is ever unpickled.

The grader runs the tests, and there the functions of the set are stand-ins that ask the student's process. Functions of other sets
are stand-ins in the student's process that ask the grader's, so that no earlier mistake costs points, and no answer has to lie there.

A message is a header in JSON and the bytes of the tensors' storages. A storage that came with a call goes back into that very
storage, so that memory which is shared, or changed in place, is so on both sides. A call whose tensors require gradients can be
asked for them later ("backward").
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
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

MOST_BYTES = 1 << 25  # of a message
MOST_ELEMENTS = 10**7  # of a tensor, however little memory it claims
RECORDS = "tree.Tree", "medusa.Sampling", "medusa.MedusaConfig", "model.ModelConfig"
CACHE, HEADS = "model.KVCache", "medusa.MedusaHeads"
HEADS_PARTS = "config", "weight", "bias", "lm_heads"


class Gone(BaseException):
    """The other process has ended or no longer makes sense. No test, and no student's `except Exception`, can pass over it."""


def loaded(name: str):
    """The class module.Class of a module that is imported already; None if it is not."""
    module, _, attribute = name.partition(".")
    return getattr(sys.modules.get(module), attribute, None)


def record_name(value) -> str | None:
    return next((name for name in RECORDS if type(value) is loaded(name)), None)


# ---- values as JSON and storages ----


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
        if record := record_name(value):
            return {
                "record": record,
                "fields": {
                    field.name: self.encode(getattr(value, field.name)) for field in fields(value)
                },
            }
        if isinstance(value, (list, tuple)):
            return {
                "list" if isinstance(value, list) else "tuple": [
                    self.encode(part) for part in value
                ]
            }
        if isinstance(value, dict):
            return {
                "counter" if isinstance(value, Counter) else "dict": [
                    [self.encode(key), self.encode(part)] for key, part in value.items()
                ]
            }
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
            "tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "stride": list(value.stride()), "offset": value.storage_offset(),
            "storage": self.index[address], "grad": value.requires_grad, "parameter": isinstance(value, nn.Parameter),
        }  # fmt: skip

    def heads(self, value) -> dict:
        """A MedusaHeads as it is, with whatever parameters it should not have."""
        parts = {name: getattr(value, name) for name in HEADS_PARTS if hasattr(value, name)}
        parts |= {
            name.replace(".", "_"): weight
            for name, weight in value.named_parameters()
            if name not in parts
        }
        return {"heads": {name: self.encode(part) for name, part in parts.items()}}

    def message(self, header: dict) -> bytes:
        blobs = [
            bytes(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes())
            for storage in self.storages
        ]
        header |= {
            "storages": [
                [len(blob), self.known.get(storage.data_ptr())]
                for blob, storage in zip(blobs, self.storages)
            ]
        }
        text = json.dumps(header).encode()
        return struct.pack("<II", len(text), sum(map(len, blobs))) + text + b"".join(blobs)


class Decoder:
    """known: the storages that went out with the call whose answer this is; writable: the addresses of those that the call may change."""

    def __init__(
        self,
        peer: "Peer",
        storages: list,
        blob: memoryview,
        known: list = (),
        writable: set = frozenset(),
    ):
        self.peer, self.storages, self.tracked = peer, [], []
        for size, origin in storages:
            part, blob = bytearray(blob[:size]), blob[size:]
            storage = (
                torch.frombuffer(part, dtype=torch.uint8).untyped_storage()
                if part
                else torch.UntypedStorage(0)
            )
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
            return {"list": list, "tuple": tuple, "iterator": iter}[kind](
                [self.decode(v) for v in content]
            )
        if kind in ("dict", "counter"):
            return {"dict": dict, "counter": Counter}[kind](
                {self.decode(k): self.decode(v) for k, v in content}
            )
        if kind == "record" and content in RECORDS:
            return loaded(content)(
                **{name: self.decode(part) for name, part in value["fields"].items()}
            )
        if kind == "generator":
            generator = torch.Generator()
            generator.set_state(self.decode(content))
            return generator
        if kind in ("tensor", "linear", "cache", "heads"):
            return getattr(self, kind)(value)
        return self.peer.decode_object(value, self)

    def tensor(self, value: dict) -> Tensor:
        dtype, shape, stride, offset = (
            getattr(torch, value["tensor"]),
            value["shape"],
            value["stride"],
            value["offset"],
        )
        storage = self.storages[value["storage"]]
        reach = (
            offset + sum((n - 1) * step for n, step in zip(shape, stride)) + 1
            if 0 not in shape
            else 0
        )
        if (
            min([offset, *shape, *stride]) < 0
            or math.prod(shape) > MOST_ELEMENTS
            or reach * dtype.itemsize > storage.nbytes()
        ):
            raise ValueError("a tensor that lies outside of its memory")
        tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
        if value["parameter"]:
            tensor = nn.Parameter(tensor, requires_grad=value["grad"])
        if value["grad"]:
            self.tracked.append(tensor)
        return tensor

    def linear(self, value: dict) -> nn.Linear:
        weight = self.decode(value["linear"])
        layer = (loaded("model.Linear") or nn.Linear)(1, 1, bias=False, device="meta")
        layer.weight = weight
        return layer

    def cache(self, value: dict):
        cache = loaded(CACHE).__new__(loaded(CACHE))
        vars(cache).update({name: self.decode(part) for name, part in value["cache"].items()})
        return cache

    def heads(self, value: dict):
        heads = loaded(HEADS).__new__(loaded(HEADS))
        nn.Module.__init__(heads)
        for name, part in value["heads"].items():
            setattr(heads, name, self.decode(part))
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
    """One end. resolve(name) is the function that the other end may call by this name; it raises for all others."""

    def __init__(self, sock, resolve):
        self.sock, self.resolve, self.graphs, self.received = sock, resolve, [], 0

    def encode_object(self, value, encoder: Encoder):
        raise TypeError(
            f"a {type(value).__module__}.{type(value).__name__} was returned: plain numbers, lists, tuples or torch tensors are asked for"
        )

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
        self.received += 1
        return header, memoryview(self.read(more))

    # -- asking

    def call(self, name: str, *args, **kwargs):
        encoder = Encoder(self)
        asked = {
            "args": encoder.encode(args),
            "kwargs": {key: encoder.encode(value) for key, value in kwargs.items()},
        }
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
        encoder = Encoder(self)
        asked = {
            "args": encoder.encode(args),
            "kwargs": {key: encoder.encode(value) for key, value in kwargs.items()},
        }
        self.send(encoder, kind="call", name=name, track=False, **asked)
        while (answer := self.answer(encoder.storages, mutable(args, kwargs)))["kind"] == "yield":
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
            writable = {
                argument.data.untyped_storage().data_ptr()
                for argument in arguments
                if type(argument) is loaded(CACHE)
            }
            decoder = Decoder(self, header["storages"], blob, storages, writable)
            if header["kind"] == "raise":
                raise rebuilt(header)
            for argument, state in zip(arguments, header.get("state", ())):
                restore(argument, decoder.decode(state))
            return {
                "kind": header["kind"],
                "value": decoder.decode(header.get("value")),
                "id": header.get("id"),
                "decoder": decoder,
            }

    # -- answering

    def serve(self, header: dict, blob: memoryview) -> None:
        try:
            function = (
                self.backward if header["name"] == "backward" else self.resolve(header["name"])
            )
            decoder = Decoder(self, header["storages"], blob)
            args = decoder.decode(header["args"])
            kwargs = {key: decoder.decode(value) for key, value in header["kwargs"].items()}
            leaves = [tensor.requires_grad_(header["track"]) for tensor in decoder.tracked]
            known = {
                storage.data_ptr(): i
                for i, storage in enumerate(decoder.storages)
                if storage.nbytes()
            }
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
            self.send(
                Encoder(self),
                kind="raise",
                type=type(error).__name__,
                text=str(error),
                where=self.where(error),
            )

    def reply(
        self, known: dict, kind: str, value, changed: list, leaves: list | None = None
    ) -> None:
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
    """The arguments that a call may change in place: caches and random generators, and nothing else."""
    return [
        value
        for value in (*args, *kwargs.values())
        if type(value) is loaded(CACHE) or isinstance(value, torch.Generator)
    ]


def restore(argument, state) -> None:
    """Bring an argument into the state that the call left it in."""
    if isinstance(argument, torch.Generator):
        argument.set_state(state.get_state())
    else:
        argument.data, argument.layers, argument.length = state.data, state.layers, state.length


def rebuilt(header: dict) -> Exception:
    """The exception that was raised at the other end, if Python has one of this name; only its text crosses."""
    kind, text = getattr(builtins, str(header["type"]), None), str(header["text"])
    try:
        error = (
            kind(text)
            if isinstance(kind, type) and issubclass(kind, Exception)
            else RuntimeError(f"{header['type']}: {text}")
        )
    except TypeError:
        error = RuntimeError(f"{header['type']}: {text}")
    if header["where"]:
        error.add_note(str(header["where"]))
    return error


class Student(Peer):
    """The end in the student's process. Models and heads of the tests stay with the grader: here stand things that ask there."""

    def __init__(self, sock, resolve, folder: Path):
        super().__init__(sock, resolve)
        self.folder = folder

    def decode_object(self, value: dict, decoder: Decoder):
        return Remote(
            self,
            value["remote"],
            **{name: decoder.decode(part) for name, part in value["parts"].items()},
        )

    def encode_object(self, value, encoder: Encoder):
        if type(value) is loaded(HEADS):
            return encoder.heads(value)
        if isinstance(value, Remote):
            return {"remote": value.name}
        return super().encode_object(value, encoder)

    def where(self, error: BaseException) -> str:
        """The last place in the student's own files."""
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).parent == self.folder
        ]
        return (
            f"in {Path(frames[-1].filename).name}, line {frames[-1].lineno}, {frames[-1].name}"
            if frames
            else ""
        )


class Remote:
    """A model or heads that live in the grader's process."""

    def __init__(self, peer: Peer, name: str, **parts):
        self.peer, self.name = peer, name
        vars(self).update(parts)

    def __call__(self, *args, **kwargs):
        return self.peer.call(self.name, *args, **kwargs)

    forward = __call__

    def shortened(self, lm_head):
        """Here heads guess among all tokens: what a truncated vocabulary saves is not what a set is about."""
        return lm_head

    def widened(self, logits):
        return logits

    def new_cache(self, capacity: int, batch: int = 1):
        weight = self.lm_head.weight
        return loaded(CACHE)(self.config, batch, capacity, weight.dtype, weight.device)


class Grader(Peer):
    """The end in the grader's process: it hands out models and heads by name, and answers calls of them."""

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
        parts = {
            name: getattr(value, name) for name in ("config", "lm_head") if hasattr(value, name)
        }
        if value not in self.objects:
            self.objects.append(value)
        return {
            "remote": f"#{self.objects.index(value)}",
            "parts": {name: encoder.encode(part) for name, part in parts.items()},
        }

    def decode_object(self, value: dict, decoder: Decoder):
        if "remote" in value:
            return self.named(str(value["remote"]))
        return super().decode_object(value, decoder)


# ---- stand-ins ----


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
    return (
        getattr(value, "func", getattr(value, "fget", value))
        if isinstance(value, (functools.cached_property, property))
        else value
    )


def stand_in(name: str, connection) -> None:
    """Put a function in place that asks the other end; connection() is the Peer to ask."""
    owner, attribute = owner_of(name)

    def call(*args, **kwargs):
        args = (
            [
                ByValue(argument) if type(argument) is loaded(HEADS) else argument
                for argument in args
            ]
            if attribute == "forward"
            else args
        )
        return connection().call(name, *args, **kwargs)

    def stream(*args, **kwargs):
        yield from connection().stream(name, *args, **kwargs)

    def initialise(self, *args, **kwargs):
        nn.Module.__init__(self)
        with torch.no_grad():
            vars(self).update(vars(connection().call(name, *args, **kwargs)))

    if isinstance(vars(owner).get(attribute), (functools.cached_property, property)):
        value = functools.cached_property(call)
        value.__set_name__(owner, attribute)
    else:
        value = {"__init__": initialise, "medusa_generate": stream}.get(attribute, call)
    setattr(owner, attribute, value)
