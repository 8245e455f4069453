"""Programs that nobody has read, run where they can do no harm."""

from posttrain.sandbox.elsewhere import Container, Service
from posttrain.sandbox.sandbox import Bubblewrap, NoSandbox, Running, Sandbox, SandboxFailed, SandboxLost, slot

__all__ = ["Bubblewrap", "Container", "NoSandbox", "Running", "Sandbox", "SandboxFailed", "SandboxLost", "Service", "slot"]
