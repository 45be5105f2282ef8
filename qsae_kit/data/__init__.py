"""Texts and chats become batches and rows; what a model brings along."""
