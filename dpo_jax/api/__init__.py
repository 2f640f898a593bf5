"""What `import dpo_jax` offers: the work of the commands as functions, with plain arguments in place of flags.

Importing a module of this package is cheap: JAX comes with the first function that needs it.
"""
