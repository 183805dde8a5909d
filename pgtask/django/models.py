"""No models: Django emits `post_migrate`, which makes our tables, only for apps that have a module of this name."""
