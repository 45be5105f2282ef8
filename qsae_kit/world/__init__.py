"""A generated world whose causes are known; plain Python."""
