"""The child that tries HDF5 files: paths on stdin, one verdict per line on stdout."""

from etl.sources._hdf5.trial import main

if __name__ == "__main__":
    main()
