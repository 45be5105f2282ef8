"""The bundled model: a small Qwen3 trained on a generated world whose causes are known."""
