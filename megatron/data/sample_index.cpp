// The one loop of sample_index.py that NumPy can only do in several passes over all documents.
// Optional: without it `locate_samples` gives the same numbers.

#include <cstdint>
#include <stdexcept>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;
constexpr std::int64_t AHEAD = 32;
using Int64Array = py::array_t<std::int64_t, py::array::c_style>;

// Position and offset of the tokens 0, seq_length, .. samples * seq_length of the stream that the documents
// `documents` (numbers into `lengths`) make one after the other: [samples + 1, 2], as SampleIndex.starts.
Int64Array locate_samples(const Int64Array& lengths, const Int64Array& documents, std::int64_t seq_length,
                          std::int64_t samples) {
    const auto length_of = lengths.unchecked<1>();
    const auto document_at = documents.unchecked<1>();
    const std::int64_t last = document_at.shape(0);
    const std::int64_t known = length_of.shape(0);
    Int64Array result({samples + 1, std::int64_t{2}});
    std::int64_t* out = result.mutable_data();
    std::int64_t* const end = out + 2 * (samples + 1);
    bool inside = true;
    {
        py::gil_scoped_release release;
        std::int64_t offset = 0;  // of the next start, from the beginning of the document at `position`
        for (std::int64_t position = 0; position < last && out != end; ++position) {
#if defined(__GNUC__)
            // The lengths are read in a random order: ask for them before they are needed.
            if (position + AHEAD < last) __builtin_prefetch(length_of.data(0) + document_at(position + AHEAD));
#endif
            const std::int64_t document = document_at(position);
            if (document < 0 || document >= known) {
                inside = false;
                break;
            }
            const std::int64_t length = length_of(document);
            for (; offset < length && out != end; offset += seq_length) {
                *out++ = position;
                *out++ = offset;
            }
            offset -= length;
        }
    }
    if (!inside) throw std::invalid_argument("a document's number is out of range");
    if (out != end) throw std::invalid_argument("the documents do not hold so many samples");
    return result;
}

PYBIND11_MODULE(_sample_index, module) {
    module.doc() = "Compiled helper of megatron.data.sample_index";
    module.def("locate_samples", &locate_samples, py::arg("lengths").noconvert(), py::arg("documents").noconvert(),
               py::arg("seq_length"), py::arg("samples"));
}
