"""The functions of `import dpo_jax`: the work of the commands with plain arguments in place of flags.

Importing a module of this package is cheap: JAX is imported by the first function that needs it.
"""
