"""PDFs as tests make them."""

from __future__ import annotations

import zlib


def pdf(*pages: str, title: str = "", stream: bytes | None = None) -> bytes:
    """A PDF of pages with a line of text each, as its standard (ISO 32000) has it; or of one, deflated: `stream`."""
    if stream is not None:
        packed = zlib.compress(stream, 9)
        whole = pdf("PAGE")
        begin = whole.index(b"<< /Length", whole.index(b"5 0 obj"))
        end = whole.index(b"endstream", begin)
        return (
            whole[:begin] + b"<< /Filter /FlateDecode /Length %d >>\nstream\n%b\n" % (len(packed), packed) + whole[end:]
        )
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects.append(f"<< /Title ({title}) >>")
    data, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{each}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(places) + 1} /Root 1 0 R "
    return data + f"{end}/Info {len(places)} 0 R >>\nstartxref\n{len(data)}\n%%EOF\n".encode()
