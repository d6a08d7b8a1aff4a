def write(folder, language):
    pass
