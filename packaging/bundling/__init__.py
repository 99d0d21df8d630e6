"""Builds what volunteers get: vmjob as one file, and QEMU with all it needs.

What goes into a bundle is decided by functions that return a `content.Tree`; it is written once, at
the end. `docs/how-to/bundle.md` says how it is used, `docs/decisions/013-bundle.md` why it is so.
"""
