"""Conversations to token ids and masks: chat templates, rendering, encoding."""
