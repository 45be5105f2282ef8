"""An untouched Hugging Face model with hook points, chats, answers and edits; knows no SAE."""
