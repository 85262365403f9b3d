"""Many processes: how they find one another, agree, share out the model, and notice that one is gone."""
