from collections.abc import Mapping, Sequence

from amaranth.hdl import Elaboratable, Shape, Signal, Value

class ReadPort:
    en: Signal
    addr: Signal
    data: Value

class WritePort:
    en: Signal
    addr: Signal
    data: Value

class Memory(Elaboratable):
    def __init__(
        self, *, shape: Shape | int, depth: int, init: Sequence[int], attrs: Mapping[str, str] = ...
    ) -> None: ...
    def read_port(self) -> ReadPort: ...
    def write_port(self) -> WritePort: ...
