"""Triton's interpreter, without most of what it does again and again."""

from triton.runtime import interpreter


def quicken() -> None:
    """Within a kernel it patches Triton's language anew at every call of a function, which takes most of its time. Once
    a module will do.
    """
    patched = set()

    def call(self: interpreter.InterpretedFunction, *arguments: object, **named: object) -> object:
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*arguments, **named)

    interpreter.InterpretedFunction.__call__ = call
