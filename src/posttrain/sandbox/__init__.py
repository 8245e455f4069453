"""Programs that nobody has read, run where they can do no harm."""

from posttrain.sandbox.sandbox import Bubblewrap, NoSandbox, Running, Sandbox, SandboxFailed, SandboxLost, slot

__all__ = ["Bubblewrap", "NoSandbox", "Running", "Sandbox", "SandboxFailed", "SandboxLost", "slot"]
